"""Work on a served model for the moments in which no request wants it.

It is done between two steps, in the loop's own thread, and given up as soon as a request arrives:
within the time that one layer takes, or one small step where ranks share the model.
"""

# Shapes: T packed tokens, H query heads, K KV heads, d head dimension.
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.errors import EngineBusyError
from mizzen.runtime.errors import MizzenError

log = logging.getLogger(__name__)

MAX_WAITING = 256
RETRY_S = 5.0


class Interrupted(Exception):
    """Somebody wants the model: the work is given up, and begins anew when it is idle again."""


class IdleWork(Protocol):
    """Something to do while nobody asks."""

    def do(self, is_wanted: Callable[[], bool]) -> None:
        """Do it whole.

        Raises:
            Interrupted: `is_wanted` became true; nothing of it has happened.
        """
        ...

    def fail(self, error: Exception) -> None:
        """Take the error that ended it."""
        ...


def busy(why: str) -> EngineBusyError:
    """Return the refusal of what may only be done in idle moments."""
    return EngineBusyError(f"{why} Try again later.", retry_after_s=RETRY_S)


class IdleQueue:
    """What waits for idle moments, in the order it came. All but `do_first` hold the lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._works: deque[IdleWork] = deque()

    def __bool__(self) -> bool:
        return bool(self._works)

    def add(self, work: IdleWork) -> None:
        """Have it done when nobody asks.

        Raises:
            EngineBusyError: too much waits already.
        """
        if len(self._works) >= MAX_WAITING:
            raise busy(f"{MAX_WAITING} others wait already for a moment without requests.")
        self._works.append(work)

    def remove(self, work: IdleWork) -> None:
        """Have it done no more; nothing happens where it is over."""
        with suppress(ValueError):
            self._works.remove(work)

    def do_first(self, is_wanted: Callable[[], bool]) -> None:
        """Do what came first, unless somebody wants the model; only for the loop's thread."""
        with self._lock:  # whoever asked may have left since the loop has looked
            work = next(iter(self._works), None)
        if work is None:
            return
        try:
            work.do(is_wanted)
        except Interrupted:
            return
        except MizzenError as error:
            work.fail(error)
        except Exception as error:
            log.exception("Work for idle moments has failed.")
            work.fail(error)
        with self._lock:
            self.remove(work)

    def fail(self, error: Exception) -> None:
        """End everything."""
        while self._works:
            self._works.popleft().fail(error)


class InterruptibleAttention(CausalAttention):
    """Causal attention that looks up at every layer."""

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
        if q_THd.is_cuda:
            # The host would launch all layers at once, and a request wait for all of them.
            torch.cuda.current_stream(q_THd.device).synchronize()
        self.look_up()
        out_THd: Tensor = super().__call__(layer, q_THd, k_TKd, v_TKd, **more)
        return out_THd

    def look_up(self) -> None:
        """Raise Interrupted if somebody wants the model."""
        if self._is_wanted():
            raise Interrupted
