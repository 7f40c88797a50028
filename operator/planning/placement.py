"""Which nodes a gang of equal pods goes to, counting one extended resource. Pure.

Only whole gangs are placed: a part of one would hold devices for nothing. Of the nodes with room
the fullest is taken, so that large blocks stay whole for replicas that need one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gang:
    """Pods that are placed together or not at all."""

    pods: int
    devices: int  # that each pod asks for
    nodes: frozenset[str] | None = None  # where its pods may go; None: anywhere

    def meets(self, other: Gang) -> bool:
        """Whether there are nodes to which both may go."""
        return self.nodes is None or other.nodes is None or bool(self.nodes & other.nodes)


def count_fitting(gang: Gang, free: Mapping[str, int]) -> int:
    """Return how many pods like the gang's find a place, were there enough of them."""
    rooms = (room for node, room in free.items() if gang.nodes is None or node in gang.nodes)
    return sum(max(0, room) // gang.devices for room in rooms)


def capped(free: Mapping[str, int], limit: Mapping[str, int] | None) -> Mapping[str, int]:
    """Return what is free, on no node more than the limit, if there is one."""
    if limit is None:
        return free
    return {node: min(room, limit.get(node, 0)) for node, room in free.items()}


def place(
    gang: Gang, free: Mapping[str, int], *, limit: Mapping[str, int] | None = None
) -> tuple[str, ...] | None:
    """Return a node for each pod, None where not all of them find one.

    The pods are equal, so one that takes the fullest node never costs another its place. Of a node
    they get no more devices than its limit.
    """
    left = dict(capped(free, limit))
    nodes: list[str] = []
    for _ in range(gang.pods):
        fitting = [
            (room, node)
            for node, room in left.items()
            if room >= gang.devices and (gang.nodes is None or node in gang.nodes)
        ]
        if not fitting:
            return None
        _, node = min(fitting)
        left[node] -= gang.devices
        nodes.append(node)
    return tuple(nodes)


def freed(free: Mapping[str, int], returned: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return what is free once these devices are back too."""
    total = dict(free)
    for devices in returned:
        for node, count in devices.items():
            if node in total:  # what comes back on a cordoned node is of no use
                total[node] += count
    return total


class Room:
    """Devices by node while one decision hands them out.

    `now` are those that nobody holds, `soon` those together with what is on its way back. What is
    kept for one gang is not there for the next, in either count.
    """

    def __init__(self, now: Mapping[str, int], leaving: Iterable[Mapping[str, int]]) -> None:
        self.now = dict(now)
        self.soon = freed(now, leaving)

    def take(self, gang: Gang, *, limit: Mapping[str, int] | None = None) -> tuple[str, ...] | None:
        """Give the gang devices that are free, if there are enough."""
        nodes = place(gang, self.now, limit=limit)
        for node in nodes or ():
            self.now[node] -= gang.devices
            self.soon[node] -= gang.devices
        return nodes

    def reserve(
        self, gang: Gang, *, limit: Mapping[str, int] | None = None
    ) -> tuple[str, ...] | None:
        """Keep devices for the gang that are free or will be, if there are enough."""
        nodes = place(gang, self.soon, limit=limit)
        for node in nodes or ():
            self.soon[node] -= gang.devices
            # Others may have the free ones only as far as what comes back covers the gang.
            self.now[node] = min(self.now[node], self.soon[node])
        return nodes

    def expect(self, returned: Iterable[Mapping[str, int]]) -> None:
        """Count on these devices too: their holders have been asked to leave."""
        self.soon = freed(self.soon, returned)
