"""Asks trainers how far they are and tells them to yield: admin port, token, one short call.

A trainer is a pod of a job, or a replica that lends its weights to one. One that does not answer is
no error here: its pod's own state says whether it lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import aiohttp

from mizzen.operator.crds.common import Json
from mizzen.operator.status.loans import Lender, parse_lender
from mizzen.operator.status.progress import Progress, parse_progress

ADMIN_PORT = 8002


class LoanRefusedError(Exception):
    """The replica will not train this job beside its weights; its text says what to change."""


class TrainerClient:
    """Calls to the admin port of trainer pods, and of replicas for loans."""

    def __init__(
        self, token_file: Path, *, timeout_s: float = 3.0, admin_port: int = ADMIN_PORT
    ) -> None:
        self._token_file = token_file
        self._admin_port = admin_port
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def progress(self, pod_ip: str) -> Progress | None:
        """Return what the trainer says about itself, None where it does not answer."""
        try:
            async with self._open().get(
                self._url(pod_ip, "/progress"), headers=self._headers()
            ) as response:
                if response.status != 200:
                    return None
                document = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        return parse_progress(document)

    async def ask_to_yield(self, pod_ip: str, *, deadline_s: int) -> bool:
        """Have the trainer commit and leave; returns whether it heard."""
        try:
            async with self._open().post(
                self._url(pod_ip, "/yield"),
                json={"deadlineSeconds": deadline_s},
                headers=self._headers(),
            ) as response:
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def lender(self, pod_ip: str) -> Lender | None:
        """Return which job a replica lends its weights to, None where it does not answer."""
        try:
            async with self._open().get(
                self._url(pod_ip, "/loan"), headers=self._headers()
            ) as response:
                if response.status != 200:
                    return None
                return parse_lender(await response.json())
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
            return None

    async def lend(self, pod_ip: str, job: Json) -> bool:
        """Have a replica train a generation of a job; returns whether it does.

        Raises:
            LoanRefusedError: trying again will not help.
        """
        try:
            async with self._open().put(
                self._url(pod_ip, "/loan"), json=job, headers=self._headers()
            ) as response:
                if response.status == 400:
                    raise LoanRefusedError(str((await response.json()).get("error")))
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False

    async def take_back(self, pod_ip: str) -> bool:
        """Have a replica's job commit and end; returns whether it heard."""
        try:
            async with self._open().delete(
                self._url(pod_ip, "/loan"), headers=self._headers()
            ) as response:
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _url(self, pod_ip: str, path: str) -> str:
        host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
        return f"http://{host}:{self._admin_port}{path}"

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self._session

    def _headers(self) -> Mapping[str, str]:
        if not self._token_file.exists():
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}
