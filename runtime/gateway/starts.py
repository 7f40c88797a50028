"""How long models take to become ready, from the first request that waited. Does no I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from mizzen.runtime.gateway.directory import ObjectKey

_REMEMBERED = 8
# Before the first measured start: a small model with its weights at hand.
_UNKNOWN_S = 15.0


class Starts:
    """The last starts of every model, and the one that runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: dict[ObjectKey, float] = {}
        self._took_s: dict[ObjectKey, deque[float]] = {}

    def note_wanted(self, model: ObjectKey) -> None:
        """Somebody waits and no replica is ready."""
        self._begun.setdefault(model, self._clock())

    def note_ready(self, model: ObjectKey) -> None:
        """A replica is ready."""
        if (begun := self._begun.pop(model, None)) is not None:
            took_s = self._clock() - begun
            self._took_s.setdefault(model, deque(maxlen=_REMEMBERED)).append(took_s)

    def running(self) -> list[ObjectKey]:
        """Models whose start is awaited."""
        return list(self._begun)

    def forget(self, model: ObjectKey) -> None:
        """The model is gone."""
        self._begun.pop(model, None)
        self._took_s.pop(model, None)

    def longest_s(self, model: ObjectKey) -> float | None:
        """The longest of the last starts, None before the first."""
        return max(self._took_s.get(model, ()), default=None)

    def left_s(self, model: ObjectKey) -> int:
        """Whole seconds until a replica can be expected, at least one."""
        longest_s = self.longest_s(model) or _UNKNOWN_S
        begun = self._begun.get(model)
        waited_s = 0.0 if begun is None else self._clock() - begun
        # A start that takes longer than any before is as likely to take as long again.
        left_s = longest_s - waited_s if waited_s < longest_s else waited_s
        return max(1, math.ceil(left_s))
