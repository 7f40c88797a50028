"""The GPUs of a simulated cluster: equal nodes that replicas fill without a rest.

A node has eight GPUs, as most machines do that are sold for this, or as many of them as whole
replicas need; a larger replica has a node of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mizzen.operator.planning.placement import Gang

_NODE_GPUS = 8


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes that hold so many replicas, and what one of those takes."""

    replicas: int
    gang: Gang
    capacity: Mapping[str, int]  # GPUs by node

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return sum(self.capacity.values())

    def free(self, taken: Iterable[tuple[str, int]]) -> dict[str, int]:
        """Return what is left of each node; `taken` are nodes and the GPUs held there."""
        left = dict(self.capacity)
        for node, gpus in taken:
            left[node] -= gpus
        return left


def build_pool(*, replicas: int, gpus: int) -> Pool:
    """Return the pool that exactly so many replicas of so many GPUs fill."""
    per_node = max(1, _NODE_GPUS // gpus)
    capacity = {}
    for number, first in enumerate(range(0, replicas, per_node)):
        capacity[f"node-{number:03}"] = gpus * min(per_node, replicas - first)
    return Pool(replicas, Gang(pods=1, devices=gpus), capacity)
