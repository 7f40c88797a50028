"""Replicas that fail again and again are passed over for a while. Judged by the traffic itself.

The rules are Envoy's outlier detection: a number of failures in a row ejects, each further
ejection lasts longer, and only a share of the replicas may be out, because a request that breaks
every replica it meets must not take them all. Does no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A refused connection is proof; an error answer may be the request's own fault.
_ERRORS_IN_A_ROW = 5
_LONGEST_FACTOR = 12


@dataclass(slots=True)
class Record:
    """What is remembered of one replica."""

    errors: int = 0
    ejections: int = 0
    ejected_until: float = 0.0


class Outliers:
    """Remembers failures and says which replicas to pass over."""

    def __init__(
        self, *, eject_s: float, max_share_ratio: float, clock: Callable[[], float]
    ) -> None:
        self._eject_s = eject_s
        self._max_share_ratio = max_share_ratio
        self._clock = clock
        self._records: dict[str, Record] = {}

    def note_failure(self, url: str) -> None:
        """It could not be reached, was lost, or fell silent: out at once."""
        record = self._records.setdefault(url, Record())
        now = self._clock()
        if now < record.ejected_until:
            return
        record.ejections += 1
        record.errors = 0
        record.ejected_until = now + self._eject_s * min(record.ejections, _LONGEST_FACTOR)

    def note_error(self, url: str) -> None:
        """It answered with an error of its own (5xx): out after several in a row."""
        record = self._records.setdefault(url, Record())
        record.errors += 1
        if record.errors >= _ERRORS_IN_A_ROW:
            self.note_failure(url)

    def note_success(self, url: str) -> None:
        """It answers: what was before is forgotten."""
        self._records.pop(url, None)

    def forget(self, url: str) -> None:
        """It is gone."""
        self._records.pop(url, None)

    def ejected(self, urls: Sequence[str]) -> frozenset[str]:
        """Return which of these replicas to pass over: never more than the share, never all.

        When more have failed, those that failed last stay out: the others' time is nearly over.
        """
        if not self._records:
            return frozenset()
        now = self._clock()
        out = [
            (record.ejected_until, url)
            for url in urls
            if (record := self._records.get(url)) is not None and now < record.ejected_until
        ]
        # One may always go where another is left, as a share of two replicas would allow none.
        room = min(len(urls) - 1, max(1, int(self._max_share_ratio * len(urls))))
        return frozenset(url for _, url in sorted(out, reverse=True)[:room])
