"""How many streams a pod has at the moment it begins to leave: what could have been cut there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection
from typing import Any

import aiohttp

from mizzen.operator.desired.labels import ADMIN_PORT, DEPLOYMENT, IN_SERVICE_GATE

_REQUESTS = re.compile(r"^vllm:num_requests_(?:running|waiting)(?:\{.*\})? (\S+)$", re.MULTILINE)
Json = dict[str, Any]


class LeavingPods:
    """Asks each pod of some deployments for its streams as soon as the API tells that it leaves."""

    def __init__(self, deployments: Collection[str]) -> None:
        self.streams: list[int] = []  # of each pod that began to leave, in that order
        self._deployments = deployments
        self._in_service: set[str] = set()
        self._asking: set[asyncio.Task[None]] = set()

    def see(self, kind: str, pod: Json) -> None:
        """Take an event of the pods' watch."""
        metadata = pod["metadata"]
        if metadata.get("labels", {}).get(DEPLOYMENT) not in self._deployments:
            return
        if is_in_service(pod):
            self._in_service.add(metadata["uid"])
        elif metadata["uid"] in self._in_service:
            self._in_service.remove(metadata["uid"])
            asking = asyncio.create_task(self._ask(pod["status"]["podIP"]))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)

    async def _ask(self, address: str) -> None:
        """Count one that does not answer as without streams: it proves nothing."""
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://{address}:{ADMIN_PORT}/metrics") as answer,
            ):
                self.streams.append(streams_in(await answer.text()))
        except (aiohttp.ClientError, TimeoutError):
            self.streams.append(0)


def is_in_service(pod: Json) -> bool:
    """Whether the operator lets requests come to it, and nobody has begun to end it."""
    conditions = pod.get("status", {}).get("conditions") or []
    is_open = any(c["type"] == IN_SERVICE_GATE and c["status"] == "True" for c in conditions)
    return is_open and "deletionTimestamp" not in pod["metadata"]


def streams_in(metrics: str) -> int:
    """Return how many requests a runtime's metrics tell of, running or waiting."""
    return sum(int(float(value)) for value in _REQUESTS.findall(metrics))
