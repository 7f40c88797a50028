"""Work on a served model for the moments in which no request wants it.

It is done in slices between two steps, in the loop's own thread, and a slice is given up as soon
as a request arrives: within the time that one layer takes, forwards or backwards.
"""

# Shapes: T packed tokens, H query heads, K KV heads, d head dimension.
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from torch import Tensor

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.errors import EngineBusyError

MAX_WAITING = 256
RETRY_S = 5.0


class Interrupted(Exception):
    """Somebody wants the model: the slice is given up, and begins anew when it is idle again."""


class IdleWork(Protocol):
    """Something to do while nobody asks."""

    def do_slice(self, is_wanted: Callable[[], bool]) -> bool:
        """Do a little; return whether more is left.

        Raises:
            Interrupted: `is_wanted` became true; nothing of the slice has happened.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Take the error that ended it."""
        ...


def busy() -> EngineBusyError:
    """Return the refusal of what may only be done in idle moments."""
    return EngineBusyError(
        "The replica is busy with requests that come first. Try again later.",
        retry_after_s=RETRY_S,
    )


class IdleQueue:
    """What waits for idle moments, in turns. Others than the loop's thread only add and remove."""

    def __init__(self) -> None:
        self._works: deque[IdleWork] = deque()

    def __bool__(self) -> bool:
        return bool(self._works)

    def add(self, work: IdleWork) -> None:
        """Have it done when nobody asks.

        Raises:
            EngineBusyError: too much waits already.
        """
        if len(self._works) >= MAX_WAITING:
            raise busy()
        self._works.append(work)

    def remove(self, work: IdleWork) -> None:
        """Have it done no more; nothing happens where it is over."""
        with suppress(ValueError):
            self._works.remove(work)

    def do_slice(self, is_wanted: Callable[[], bool]) -> None:
        """Do a slice of the first and put it behind the others, unless somebody wants the model."""
        work = self._works[0]
        has_more = False
        try:
            has_more = work.do_slice(is_wanted)
        except Interrupted:
            return
        except Exception as error:
            work.fail(error)
        self.remove(work)
        if has_more:
            self._works.append(work)

    def fail(self, error: Exception) -> None:
        """End everything."""
        while self._works:
            self._works.popleft().fail(error)


class InterruptibleAttention(CausalAttention):
    """Causal attention that looks up at every layer, on the way back too."""

    def __init__(self, lens: list[int], is_wanted: Callable[[], bool]) -> None:
        super().__init__(lens)
        self._is_wanted = is_wanted

    def __call__(
        self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, **more: object
    ) -> Tensor:
        """Return out_THd.

        Raises:
            Interrupted: somebody wants the model.
        """
        self.look_up()
        out_THd: Tensor = super().__call__(layer, q_THd, k_TKd, v_TKd, **more)
        if out_THd.requires_grad:
            out_THd.register_hook(self.look_up)
        return out_THd

    def look_up(self, *_: object) -> None:
        """Raise Interrupted if somebody wants the model."""
        if self._is_wanted():
            raise Interrupted
