"""Which replica gets a request: the one with the fewest of ours in flight. Does no I/O."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from mizzen.runtime.gateway.directory import Endpoint


class Balancer:
    """Counts this gateway's requests on every replica; nothing that two gateways must share."""

    def __init__(self, *, eject_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._eject_s = eject_s
        self._clock = clock
        self._in_flight: Counter[str] = Counter()
        self._failed_at: dict[str, float] = {}
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    def in_flight(self, url: str) -> int:
        """How many of our requests a replica is answering."""
        return self._in_flight[url]

    def choose(
        self, endpoints: Collection[Endpoint], *, without: Collection[str] = ()
    ) -> Endpoint | None:
        """Return the least loaded replica, one that just failed only when there is no other."""
        candidates = [e for e in endpoints if e.url not in without]
        return min(candidates, key=self._cost, default=None)

    def note_failure(self, url: str) -> None:
        """Remember that a replica could not be reached or fell silent."""
        self._failed_at[url] = self._clock()

    def note_success(self, url: str) -> None:
        """A replica that answers is a good choice again."""
        self._failed_at.pop(url, None)

    def forget(self, url: str) -> None:
        """Drop what is known of a replica that is gone; requests it still answers stay counted."""
        self._failed_at.pop(url, None)
        self._last_turn.pop(url, None)

    @contextmanager
    def lease(self, url: str) -> Iterator[None]:
        """Count one request on a replica while the block runs."""
        self._turns += 1
        self._last_turn[url] = self._turns
        self._in_flight[url] += 1
        try:
            yield
        finally:
            self._in_flight[url] -= 1
            if not self._in_flight[url]:
                del self._in_flight[url]

    def _cost(self, endpoint: Endpoint) -> tuple[bool, int, int]:
        url = endpoint.url
        # Equal replicas take turns: the one whose last turn is longest ago goes first.
        return self._is_ejected(url), self._in_flight[url], self._last_turn.get(url, 0)

    def _is_ejected(self, url: str) -> bool:
        failed_at = self._failed_at.get(url)
        return failed_at is not None and self._clock() - failed_at < self._eject_s
