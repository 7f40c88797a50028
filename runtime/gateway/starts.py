"""How long models take to become ready, from the first request that waited. Does no I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from mizzen.runtime.gateway.directory import ObjectKey

_REMEMBERED = 8
# Before anybody has measured a start: a small model with its weights at hand.
_UNKNOWN_S = 15.0
# Nobody is told to stay away for longer: what is broken may be mended any minute.
_LONGEST_S = 900.0
# Who was told to come back has done so by then, or waits no more.
_ABANDONED_S = 2 * _LONGEST_S


class Starts:
    """The last starts of every model, and the one that runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: dict[ObjectKey, float] = {}
        self._wanted: dict[ObjectKey, float] = {}  # when somebody waited last
        self._took_s: dict[ObjectKey, deque[float]] = {}

    def note_wanted(self, model: ObjectKey) -> None:
        """Somebody waits and no replica is ready."""
        self._wanted[model] = now = self._clock()
        self._begun.setdefault(model, now)

    def note_ready(self, model: ObjectKey) -> None:
        """A replica is ready."""
        if (begun := self._begun.pop(model, None)) is not None:
            took_s = self._clock() - begun
            self._took_s.setdefault(model, deque(maxlen=_REMEMBERED)).append(took_s)

    def running(self) -> list[ObjectKey]:
        """Models whose start is awaited; one that nobody has waited for in a while is given up."""
        oldest = self._clock() - _ABANDONED_S
        for model in [model for model in self._begun if self._wanted[model] < oldest]:
            del self._begun[model]
        return list(self._begun)

    def forget(self, model: ObjectKey) -> None:
        """The model is gone."""
        self._begun.pop(model, None)
        self._wanted.pop(model, None)
        self._took_s.pop(model, None)

    def longest_s(self, model: ObjectKey, *, told_s: float | None = None) -> float | None:
        """The longest of the last starts seen, of none `told_s`: what the operator has measured."""
        return max(self._took_s.get(model, ()), default=told_s)

    def left_s(self, model: ObjectKey, *, told_s: float | None = None) -> int:
        """Whole seconds until a replica can be expected, from one to a quarter of an hour."""
        longest_s = self.longest_s(model, told_s=told_s) or _UNKNOWN_S
        begun = self._begun.get(model)
        waited_s = 0.0 if begun is None else self._clock() - begun
        # A start that takes longer than any before is as likely to take as long again.
        left_s = longest_s - waited_s if waited_s < longest_s else waited_s
        return max(1, math.ceil(min(left_s, _LONGEST_S)))
