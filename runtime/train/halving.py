"""How many samples run at once, and half as many where memory runs out.

What comes of a sample does not depend on its neighbours but for rounding, so fewer at a time only
take longer.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from mizzen.runtime.train.errors import MemoryTooSmallError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
# What a number of samples at once is of: those that are read, or answers that are drawn.
Limit = Literal["micro_batch", "drawn"]


class FewerAtOnce(Exception):
    """Raised on one of several ranks of a model, when memory runs out: so many may fit."""

    def __init__(self, limit: Limit, samples: int) -> None:
        super().__init__(f"Memory ran out; no more than {samples} at once may fit.")
        self.limit = limit
        self.samples = samples


class AtOnce:
    """So many samples at once, and half as many from then on where memory runs out."""

    def __init__(self, samples: int, *, limit: Limit = "micro_batch") -> None:
        self.samples = samples
        self._limit = limit

    def fit(self, work: Callable[[], T], *, of: int, ranks: int = 1) -> T:
        """Return what `work` returns, which is called again where memory runs out.

        It takes `samples` of the `of` that there are, on each of so many ranks of one model.

        Raises:
            MemoryTooSmallError: not even one sample fits.
            FewerAtOnce: of several ranks of one model none can try again alone.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                tried = min(self.samples, of)
                if not is_out_of_memory(error):
                    raise
                if tried == 1:
                    raise MemoryTooSmallError from error
                if ranks > 1:
                    # The others wait in the middle of a layer for what does not come.
                    raise FewerAtOnce(self._limit, tried // 2) from error
            # Outside of the handler, whose traceback holds on to what did not fit.
            gc.collect()
            self.samples = tried // 2
            log.warning("Memory ran out; going on with %d samples at once.", self.samples)

    def in_parts(
        self, items: Sequence[T], work: Callable[[Sequence[T], int], Sequence[R]], *, ranks: int = 1
    ) -> list[R]:
        """Return what `work` makes of each item, given some of them and the first one's number.

        Raises as `fit` does.
        """
        found: list[R] = []

        def next_part() -> Sequence[R]:
            first = len(found)
            return work(items[first : first + self.samples], first)

        while len(found) < len(items):
            found.extend(self.fit(next_part, of=len(items) - len(found), ranks=ranks))
        return found


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device or the host had no room; torch has no class of its own for the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
