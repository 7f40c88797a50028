"""Who goes next of those who wait: by priority, then in fair turns between clients. Pure.

The turns are start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996): each
client's requests follow one another in a virtual time that runs as slowly as its requests are
dear, and the earliest start is next. A client with a thousand requests delays another's one
request by one of its own, not by a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

_count = count()


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A place in the order; the smallest is next."""

    negative_priority: int
    start: float
    number: int


class FairOrder:
    """Hands out turns. A turn kept by a request that comes back is still its turn."""

    def __init__(self) -> None:
        self._now = 0.0
        self._finish: dict[str, float] = {}

    def next_turn(self, *, client: str, priority: int, cost: float) -> Turn:
        """Return the turn of a new request; a higher `priority` goes before any lower one."""
        start = max(self._now, self._finish.get(client, 0.0))
        self._finish[client] = start + cost
        return Turn(-priority, start, next(_count))

    def on_served(self, turn: Turn) -> None:
        """A request's turn has come: who has been idle until now starts from here."""
        self._now = max(self._now, turn.start)
