"""Which replica gets a request, from what this gateway has seen of each. Does no I/O."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from mizzen.runtime.gateway.directory import Endpoint
from mizzen.runtime.gateway.outliers import Outliers
from mizzen.runtime.gateway.placement import Load, choose_replica

_BUSY_S = 0.5


class Balancer:
    """Counts this gateway's requests on every replica; nothing that two gateways must share."""

    def __init__(
        self,
        *,
        eject_s: float,
        max_ejected_ratio: float = 0.5,
        load_factor: float = 1.25,
        most_in_flight: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outliers = Outliers(eject_s=eject_s, max_share_ratio=max_ejected_ratio, clock=clock)
        self._load_factor = load_factor
        self._most_in_flight = most_in_flight
        self._clock = clock
        self._full: dict[str, tuple[int, float]] = {}
        self._in_flight: Counter[str] = Counter()
        self._turns = 0
        self._last_turn: dict[str, int] = {}

    def in_flight(self, url: str) -> int:
        """How many of our requests a replica is answering."""
        return self._in_flight[url]

    def choose(
        self,
        endpoints: Collection[Endpoint],
        *,
        key: int | None = None,
        without: Collection[str] = (),
    ) -> Endpoint | None:
        """Return the replica for a request; one that fails only when there is no other.

        `key` is the request's affinity; `without` are the replicas it has tried. None: all others
        are full.
        """
        candidates = {
            e.url: e for e in endpoints if e.url not in without and not self._is_full(e.url)
        }
        out = self.outliers.ejected([e.url for e in endpoints])
        loads = [
            Load(url, self._in_flight[url], self._last_turn.get(url, 0))
            for url in ([url for url in candidates if url not in out] or candidates)
        ]
        chosen = choose_replica(loads, key=key, load_factor=self._load_factor)
        return None if chosen is None else candidates[chosen.url]

    def note_busy(self, url: str) -> None:
        """It refused a request for want of room: full until one of ours ends, or for a moment."""
        # The refused request itself is still counted.
        self._full[url] = (self._in_flight[url] - 1, self._clock() + _BUSY_S)

    def _is_full(self, url: str) -> bool:
        if self._in_flight[url] >= self._most_in_flight:
            return True
        if (mark := self._full.get(url)) is None:
            return False
        refused_at, until = mark
        if self._in_flight[url] >= refused_at and self._clock() < until:
            return True
        del self._full[url]
        return False

    def forget(self, url: str) -> None:
        """Drop what is known of a replica that is gone; requests it still answers stay counted."""
        self.outliers.forget(url)
        self._full.pop(url, None)
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
