"""A rank above 0 in a loan: it begins when rank 0 says so, and trains its part of the adapter."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mizzen.runtime.engine.wire import Lend
from mizzen.runtime.model.decoder import Decoder

if TYPE_CHECKING:
    from mizzen.runtime.engine.loan import Loan

log = logging.getLogger(__name__)

# Between two steps of a running request lies less, also where clients are slow to read.
_RECENT_S = 0.1


class RecentSteps:
    """Whether requests are there, as far as a rank can tell that is only told of steps."""

    def __init__(self) -> None:
        self._is_at_one = threading.Event()
        self._ended_at_s = -_RECENT_S

    @contextmanager
    def one(self) -> Iterator[None]:
        """Compute a step inside."""
        self._is_at_one.set()
        try:
            yield
        finally:
            self._ended_at_s = time.monotonic()
            self._is_at_one.clear()

    def are_recent(self) -> bool:
        """Whether a step is under way, or has just been."""
        return self._is_at_one.is_set() or time.monotonic() - self._ended_at_s < _RECENT_S


class LendingRank:
    """This rank's part of the last loan."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        # The trainer's modules take seconds to import, in which steps have to go on.
        self._beginner = ThreadPoolExecutor(1)
        self._begun: Future[Loan] | None = None

    def begin(
        self,
        message: Lend,
        decoder: Decoder,
        is_wanted: Callable[[], bool],
        *,
        spare_bytes: Callable[[], int],
    ) -> None:
        """Begin beside these weights, once what was begun before is over."""
        before = self._begun

        def start() -> "Loan":
            from mizzen.runtime.engine.loan import Loan, MeetingPoint  # noqa: PLC0415
            from mizzen.runtime.train.lendable import read_loan  # noqa: PLC0415

            _end(before)
            loan = Loan(
                read_loan(message.job),
                decoder,
                is_wanted,
                spare_bytes=spare_bytes,
                step_tokens=message.step_tokens,
                ranks=MeetingPoint(self._rank, self._size, message.store),
            )
            loan.start()
            return loan

        self._begun = self._beginner.submit(start)

    def take_back(self) -> None:
        """Block until the loan holds nothing of the model any more."""
        _end(self._begun)
        self._begun = None


def _end(begun: "Future[Loan] | None") -> None:
    if begun is None:
        return
    wait([begun])
    if (error := begun.exception()) is not None:
        log.error("This rank's part of a loan has not begun.", exc_info=error)
        return
    begun.result().ask_to_stop()
    begun.result().wait()
