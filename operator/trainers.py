"""Asks trainer pods how far they are and tells them to yield: admin port, token, one short call.

A trainer that does not answer is no error here: its pod's own state says whether it lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import aiohttp

from mizzen.operator.status.progress import Progress, parse_progress

ADMIN_PORT = 8002


class TrainerClient:
    """Calls to the admin port of trainer pods."""

    def __init__(self, token_file: Path, *, timeout_s: float = 3.0) -> None:
        self._token_file = token_file
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def progress(self, pod_ip: str) -> Progress | None:
        """Return what the trainer says about itself, None where it does not answer."""
        try:
            async with self._open().get(
                f"http://{pod_ip}:{ADMIN_PORT}/progress", headers=self._headers()
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
                f"http://{pod_ip}:{ADMIN_PORT}/yield",
                json={"deadlineSeconds": deadline_s},
                headers=self._headers(),
            ) as response:
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        return self._session

    def _headers(self) -> Mapping[str, str]:
        if not self._token_file.exists():
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}
