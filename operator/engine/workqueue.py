"""A work queue that holds each key once and never gives one key to two workers.

A key that is added while a worker has it is handed out again afterwards, so no change is ever
missed and a burst of changes costs one more look. Time is the event loop's, so tests run it in
virtual time. Must not know what a key means.
"""

import asyncio
import heapq
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from mizzen.operator.engine.backoff import Backoff
from mizzen.operator.engine.key import Key

__all__ = ["Key", "QueueObserver", "WorkQueue"]


class QueueObserver(Protocol):
    """Gets told what happens in the queue; telemetry implements it."""

    def added(self, kind: str) -> None:
        """A key became due."""

    def taken(self, kind: str, waited_s: float) -> None:
        """A worker took a key `waited_s` seconds after it became due."""

    def finished(self, kind: str, worked_s: float) -> None:
        """A worker gave a key back."""

    def retried(self, kind: str) -> None:
        """A key was put off after a failure."""


class _Silent:
    def added(self, kind: str) -> None:
        pass

    def taken(self, kind: str, waited_s: float) -> None:
        pass

    def finished(self, kind: str, worked_s: float) -> None:
        pass

    def retried(self, kind: str) -> None:
        pass


@dataclass(slots=True)
class _Work:
    """A key in a worker's hands."""

    started_at: float
    is_dirty: bool = False


class WorkQueue:
    """Deduplicating queue of keys with delays and per-key backoff."""

    def __init__(
        self, *, backoff: Backoff | None = None, observer: QueueObserver | None = None
    ) -> None:
        self._backoff = backoff or Backoff()
        self._observer: QueueObserver = observer or _Silent()
        self._ready: deque[Key] = deque()
        self._ready_since: dict[Key, float] = {}
        # A key's earliest due time; the heap may hold older entries, which are skipped.
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._working: dict[Key, _Work] = {}
        self._failures: dict[Key, int] = {}
        self._takers: deque[asyncio.Future[None]] = deque()
        self._alarm: asyncio.TimerHandle | None = None
        self._is_closed = False

    def __len__(self) -> int:
        """Return how many keys are due and wait for a worker."""
        return len(self._ready)

    @property
    def delayed(self) -> int:
        """How many keys wait for their time."""
        return len(self._due)

    @property
    def working(self) -> int:
        """How many keys are in workers' hands."""
        return len(self._working)

    def oldest_age_s(self) -> float:
        """Return how long the longest waiting due key has waited, 0 with none."""
        if not self._ready:
            return 0.0
        return _now() - self._ready_since[self._ready[0]]

    def longest_work_s(self) -> float:
        """Return how long the slowest running reconcile has run, 0 with none."""
        started = min((work.started_at for work in self._working.values()), default=None)
        return 0.0 if started is None else _now() - started

    def add(self, key: Key, after_s: float = 0.0) -> None:
        """Make the key due after `after_s` seconds, or keep an earlier time it already has."""
        if self._is_closed or key in self._ready_since:
            return
        if after_s <= 0:
            self._make_ready(key)
            return
        due = _now() + after_s
        if self._due.get(key, float("inf")) <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, key))
        self._set_alarm()

    def retry(self, key: Key) -> float:
        """Make the key due after its next backoff pause and return that pause in seconds."""
        failures = self._failures.get(key, 0) + 1
        self._failures[key] = failures
        self._observer.retried(key.kind)
        pause_s = self._backoff.delay_s(failures)
        self.add(key, pause_s)
        return pause_s

    def succeed(self, key: Key) -> None:
        """Forget the key's failures: the next one starts with the shortest pause again."""
        self._failures.pop(key, None)

    async def get(self) -> Key:
        """Wait for a due key and take it; `done` must follow.

        Raises:
            asyncio.CancelledError: the queue was closed.
        """
        while not self._ready:
            if self._is_closed:
                raise asyncio.CancelledError
            taker = asyncio.get_running_loop().create_future()
            self._takers.append(taker)
            try:
                await taker
            except asyncio.CancelledError:
                # The wake-up this taker may have got belongs to another one now.
                if taker.done() and not taker.cancelled():
                    self._wake_one()
                raise
            finally:
                if not taker.done() or taker.cancelled():
                    self._drop_taker(taker)
        key = self._ready.popleft()
        now = _now()
        self._observer.taken(key.kind, now - self._ready_since.pop(key))
        self._working[key] = _Work(started_at=now)
        return key

    def done(self, key: Key) -> None:
        """Give the key back; it becomes due at once if it was added meanwhile."""
        work = self._working.pop(key)
        self._observer.finished(key.kind, _now() - work.started_at)
        if work.is_dirty:
            self._make_ready(key)

    def close(self) -> None:
        """Hand out nothing more and wake everybody who waits."""
        self._is_closed = True
        if self._alarm is not None:
            self._alarm.cancel()
        while self._takers:
            self._wake_one()

    def _make_ready(self, key: Key) -> None:
        self._due.pop(key, None)
        if work := self._working.get(key):
            work.is_dirty = True
            return
        if self._is_closed or key in self._ready_since:
            return
        self._ready_since[key] = _now()
        self._ready.append(key)
        self._observer.added(key.kind)
        self._wake_one()

    def _wake_one(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                return

    def _drop_taker(self, taker: asyncio.Future[None]) -> None:
        if taker in self._takers:
            self._takers.remove(taker)

    def _set_alarm(self) -> None:
        """Have the loop call when the earliest delayed key is due."""
        if not self._heap or self._is_closed:
            return
        due = self._heap[0][0]
        if self._alarm is not None:
            if not self._alarm.cancelled() and self._alarm.when() <= due:
                return
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        now = _now()
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                self._make_ready(key)
        self._set_alarm()


def _now() -> float:
    return asyncio.get_running_loop().time()
