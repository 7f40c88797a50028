"""What the operator asks of runtime pods: finish and go, and which adapters to serve.

Drain and the list of adapters are calls to the admin port; loading and unloading are tritonclient's
model-repository calls. A runtime that does not answer is an answer too: None, never an exception.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import aiohttp

ADMIN_PORT = 8002
HTTP_PORT = 8000
_LOAD_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 30.0
LONGEST_CALL_S = 600.0  # new weights may be a hundred gigabytes


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that a runtime says it serves."""

    name: str
    digest: str | None = None


class AdapterRefusedError(Exception):
    """The runtime will not serve this adapter; its text says why, and a retry will not help."""


class WeightsRefusedError(Exception):
    """The runtime will not serve these weights in place of its own; its text says why."""


class Runtimes(Protocol):
    """The calls; tests put a runtime of their own behind them."""

    async def drain(self, pod_ip: str) -> int | None:
        """Have the runtime refuse new requests; return how many are left, None for no answer."""

    async def adapters(self, pod_ip: str) -> tuple[LoadedAdapter, ...] | None:
        """Return the adapters it serves, None for no answer."""

    async def loading(self, pod_ip: str) -> Mapping[str, object] | None:
        """Return how far its model's files have come, None where none come or for no answer."""

    async def model(self, pod_ip: str) -> Mapping[str, object] | None:
        """Return what its model is made of and how much of it fits there, None for no answer."""

    async def complete(
        self, pod_ip: str, model: str, prompt: str, *, max_tokens: int
    ) -> str | None:
        """Return the greedy continuation of a prompt, None for no answer."""

    async def load_adapter(self, pod_ip: str, name: str, *, path: str, digest: str | None) -> bool:
        """Load an adapter, or its newer content; return whether it was done.

        Raises:
            AdapterRefusedError: trying again will not help.
        """

    async def unload_adapter(self, pod_ip: str, name: str) -> bool:
        """Stop serving an adapter; return whether it was done."""

    async def load_weights(self, pod_ip: str, path: str) -> bool:
        """Serve other weights of the same model; return whether it was done.

        Raises:
            WeightsRefusedError: trying again will not help.
        """

    async def close(self) -> None:
        """Close the connections."""


class HttpRuntimes:
    """The real ones."""

    def __init__(
        self,
        token_file: Path,
        *,
        timeout_s: float = 3.0,
        http_port: int = HTTP_PORT,
        admin_port: int = ADMIN_PORT,
    ) -> None:
        self._token_file = token_file
        self._http_port = http_port
        self._admin_port = admin_port
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def drain(self, pod_ip: str) -> int | None:
        """Have the runtime refuse new requests; return how many are left, None for no answer."""
        answer = await self._ask_admin("POST", pod_ip, "/drain")
        left = (answer or {}).get("inFlight")
        return left if isinstance(left, int) else None

    async def adapters(self, pod_ip: str) -> tuple[LoadedAdapter, ...] | None:
        """Return the adapters it serves, None for no answer."""
        answer = await self._ask_admin("GET", pod_ip, "/adapters")
        entries = (answer or {}).get("adapters")
        if not isinstance(entries, list):
            return None
        return tuple(LoadedAdapter(entry["name"], entry.get("digest")) for entry in entries)

    async def loading(self, pod_ip: str) -> Mapping[str, object] | None:
        """Return how far its model's files have come, None where none come or for no answer."""
        document = ((await self._ask_admin("GET", pod_ip, "/loading")) or {}).get("loading")
        return document if isinstance(document, dict) else None

    async def model(self, pod_ip: str) -> Mapping[str, object] | None:
        """Return what its model is made of and how much of it fits there, None for no answer."""
        return await self._ask_admin("GET", pod_ip, "/model")

    async def complete(
        self, pod_ip: str, model: str, prompt: str, *, max_tokens: int
    ) -> str | None:
        """Return the greedy continuation of a prompt, None for no answer."""
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        url = f"http://{_host(pod_ip)}:{self._http_port}/v1/completions"
        answer = await self._ask("POST", url, body=body, timeout_s=_ANSWER_TIMEOUT_S)
        try:
            return str((answer or {})["choices"][0]["text"])  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None

    async def load_adapter(self, pod_ip: str, name: str, *, path: str, digest: str | None) -> bool:
        """Load an adapter, or its newer content; return whether it was done.

        Raises:
            AdapterRefusedError: trying again will not help.
        """
        parameters = {"path": path} | ({"digest": digest} if digest else {})
        config = json.dumps({"parameters": parameters})
        return await self._change_repository(pod_ip, name, config=config)

    async def unload_adapter(self, pod_ip: str, name: str) -> bool:
        """Stop serving an adapter; return whether it was done."""
        try:
            return await self._change_repository(pod_ip, name, config=None)
        except AdapterRefusedError:
            return True  # it is not loaded: what was asked for is so

    async def load_weights(self, pod_ip: str, path: str) -> bool:
        """Serve other weights of the same model; return whether it was done.

        Raises:
            WeightsRefusedError: trying again will not help.
        """
        url = f"http://{_host(pod_ip)}:{self._admin_port}/weights"
        timeout = aiohttp.ClientTimeout(total=LONGEST_CALL_S)
        try:
            async with aiohttp.request(
                "POST", url, headers=self._headers(), json={"path": path}, timeout=timeout
            ) as response:
                if _is_refusal(str(response.status)):
                    raise WeightsRefusedError(str((await response.json()).get("error")))
                return response.status < 300
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return False

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _ask_admin(self, method: str, pod_ip: str, path: str) -> dict[str, object] | None:
        return await self._ask(method, f"http://{_host(pod_ip)}:{self._admin_port}{path}")

    async def _ask(
        self,
        method: str,
        url: str,
        *,
        body: Mapping[str, object] | None = None,
        timeout_s: float | None = None,
    ) -> dict[str, object] | None:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, url, headers=self._headers(), json=body, timeout=timeout
            ) as response:
                if response.status >= 300:
                    return None
                document = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return None
        return document if isinstance(document, dict) else None

    async def _change_repository(self, pod_ip: str, name: str, *, config: str | None) -> bool:
        # Imported by the first adapter: it brings 20 MiB that most operators never need.
        from tritonclient.http.aio import InferenceServerClient  # noqa: PLC0415
        from tritonclient.utils import InferenceServerException  # noqa: PLC0415

        address = f"{_host(pod_ip)}:{self._http_port}"
        client = InferenceServerClient(address, conn_timeout=_LOAD_TIMEOUT_S)
        headers = dict(self._headers())
        try:
            if config is None:
                await client.unload_model(name, headers=headers)
            else:
                await client.load_model(name, headers=headers, config=config)
        except InferenceServerException as error:
            if _is_refusal(error.status()):
                raise AdapterRefusedError(str(error.message())) from error
            return False
        except (aiohttp.ClientError, TimeoutError):
            return False
        finally:
            await client.close()
        return True

    def _headers(self) -> Mapping[str, str]:
        if not self._token_file.exists():
            return {}
        return {"Authorization": f"Bearer {self._token_file.read_text().strip()}"}


def _host(pod_ip: str) -> str:
    return f"[{pod_ip}]" if ":" in pod_ip else pod_ip


def _is_refusal(status: str | None) -> bool:
    """Whether the answer blames the request: 4xx, but not the token or the time."""
    return (status or "").startswith("4") and status not in ("401", "408", "429")
