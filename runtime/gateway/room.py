"""Where requests wait: for a model that starts, or for one whose replicas are all busy.

Bounded in number and bytes over all models. Must not know why anybody waits.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from mizzen.runtime.gateway.directory import ObjectKey
from mizzen.runtime.gateway.fairness import FairOrder, Turn

_COST_BYTES = 4096


class RoomFullError(Exception):
    """No further request may wait; the message says which bound is reached."""


@dataclass(slots=True, eq=False)
class Place:
    """One request's place; the turn it gets at its first entry stays its own."""

    model: ObjectKey
    client: str
    priority: int
    size_bytes: int
    turn: Turn | None = None
    called: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self, timeout_s: float) -> None:
        """Return when this place is called, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.called.wait()
        self.called.clear()


@dataclass(slots=True)
class _Queue:
    order: FairOrder = field(default_factory=FairOrder)
    places: dict[Place, None] = field(default_factory=dict)

    def first(self) -> Place:
        return min(self.places, key=_turn_of)


class WaitingRoom:
    """Places by model. One call wakes the next in order, who calls the next when it can go."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._queues: dict[ObjectKey, _Queue] = {}
        self._requests = 0
        self._bytes = 0
        self.stirred = asyncio.Event()

    def held(self, model: ObjectKey) -> int:
        """How many requests wait for a model."""
        queue = self._queues.get(model)
        return 0 if queue is None else len(queue.places)

    def waited_for(self) -> list[ObjectKey]:
        """Models that somebody waits for."""
        return list(self._queues)

    def may_go(self, model: ObjectKey, place: Place | None) -> bool:
        """Whether nobody else is to go before this request."""
        queue = self._queues.get(model)
        return queue is None or (place is not None and queue.first() is place)

    def enter(self, place: Place) -> None:
        """Take the place; nothing happens where it is taken already.

        Raises:
            RoomFullError: the room has no room for this request.
        """
        queue = self._queues.get(place.model)
        if queue is not None and place in queue.places:
            return
        if self._requests >= self._max_requests:
            raise RoomFullError(f"{self._requests} requests wait already")
        if self._bytes + place.size_bytes > self._max_bytes:
            raise RoomFullError(f"{self._bytes // 2**20} MiB of requests wait already")
        if queue is None:
            # A turn of the queue before this one would mean nothing here.
            queue, place.turn = self._queues.setdefault(place.model, _Queue()), None
        if place.turn is None:
            place.turn = queue.order.next_turn(
                client=place.client,
                priority=place.priority,
                cost=1 + place.size_bytes / _COST_BYTES,
            )
        queue.places[place] = None
        self._requests += 1
        self._bytes += place.size_bytes
        self.stirred.set()

    def leave(self, place: Place, *, served: bool = False) -> None:
        """Give the place up and call the next; `served` says that its turn has come."""
        queue = self._queues.get(place.model)
        if queue is None or place not in queue.places:
            return
        del queue.places[place]
        self._requests -= 1
        self._bytes -= place.size_bytes
        if served and place.turn is not None:
            queue.order.on_served(place.turn)
        if queue.places:
            self.call_next(place.model)
        else:
            del self._queues[place.model]

    def call_next(self, model: ObjectKey) -> None:
        """Wake the one whose turn it is, if anybody waits for the model."""
        if (queue := self._queues.get(model)) is not None:
            queue.first().called.set()


def _turn_of(place: Place) -> Turn:
    assert place.turn is not None
    return place.turn
