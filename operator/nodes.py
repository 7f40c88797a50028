"""How large the cluster's nodes are, asked for only while a pod finds no place."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import Forbidden
from mizzen.operator.planning.capacity import largest_node

# A thousand pods without a place must not mean a thousand lists of all nodes.
_FRESH_FOR = timedelta(seconds=30)


class NodeSizes:
    """The nodes' allocatable resources as of half a minute ago at most."""

    def __init__(self) -> None:
        self._allocatables: list[dict[str, object]] | None = None
        self._asked_at: datetime | None = None
        self._lock = asyncio.Lock()

    async def largest(self, resource: str, kube: Kube, *, now: datetime) -> int | None:
        """Return the most devices of this resource on one node; None where we may not look."""
        async with self._lock:
            if self._asked_at is None or now - self._asked_at > _FRESH_FOR:
                self._allocatables = await _allocatables(kube)
                self._asked_at = now
        if self._allocatables is None:
            return None
        return largest_node(resource, self._allocatables)


async def _allocatables(kube: Kube) -> list[dict[str, object]] | None:
    found: list[dict[str, object]] = []
    try:
        async for page in kube.pages("v1", "Node"):
            found += [node["status"].get("allocatable", {}) for node in page.items]
    except Forbidden:
        return None  # an installation for single namespaces has no right to see nodes
    return found
