"""How far a model has come: counted when somebody asks, so that nobody else pays for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from enum import StrEnum

_WINDOW_S = 20.0  # the rate is of this last while, so that the rest is not told from a slow start


class Stage(StrEnum):
    """What is being done to have the files here."""

    LISTING = "Listing"
    WAITING = "Waiting"  # another replica on this node brings them
    DOWNLOADING = "Downloading"
    CHECKING = "Checking"


class LoadProgress:
    """Bytes so far, of how many, how fast, and how long it will still take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # the files come in one thread and are asked about in another
        self._count: Callable[[], int] | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self.stage: Stage | None = None
        self.total_bytes: int | None = None

    def begin(
        self, stage: Stage, total_bytes: int | None = None, count: Callable[[], int] | None = None
    ) -> None:
        """Enter a stage of `total_bytes`; `count` says how many of them are done."""
        with self._lock:
            self._count, self.total_bytes, self.stage = count, total_bytes, stage
            self._seen.clear()
            self._look()

    def end(self) -> None:
        """Leave the last stage: everything is here, or nothing will come."""
        with self._lock:
            self.stage, self.total_bytes, self._count = None, None, None

    def to_api(self) -> dict[str, object] | None:
        """Return the document for the admin port, None while nothing is brought here."""
        with self._lock:
            return self._document()

    def _document(self) -> dict[str, object] | None:
        if self.stage is None:
            return None
        document: dict[str, object] = {"stage": self.stage.value}
        if (done := self._look()) is None or self.total_bytes is None:
            return document
        document |= {"bytes": done, "totalBytes": self.total_bytes}
        if rate := self._rate():
            left = max(0, self.total_bytes - done)
            document |= {"bytesPerSecond": round(rate), "remainingSeconds": round(left / rate)}
        return document

    def _look(self) -> int | None:
        if self._count is None or self.total_bytes is None:
            return None
        done, now = min(self._count(), self.total_bytes), self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()
        return done

    def _rate(self) -> float:
        (then, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - then) if now > then else 0.0
