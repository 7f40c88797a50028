"""Lends the served weights to one training job at a time."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mizzen.runtime.engine.api import LoanState
from mizzen.runtime.engine.idle import busy
from mizzen.runtime.engine.wire import Lend
from mizzen.runtime.model.decoder import Decoder

if TYPE_CHECKING:
    from mizzen.runtime.engine.loan import Loan, MeetingPoint
    from mizzen.runtime.engine.loop import Loop
    from mizzen.runtime.engine.ranks import ModelRanks


class Lender:
    """Knows the job that has the weights, or had them last. Its calls come one at a time."""

    def __init__(self, loop: "Loop", ranks: "ModelRanks") -> None:
        """Make one; whoever wants the loop comes before a job."""
        self._loop, self._ranks = loop, ranks
        # The memory beside the model and its cache, for jobs and for the loop's own steps.
        self._spare_bytes = ranks.spare_bytes
        self._step_tokens = loop.scheduler.limits.step_tokens
        self._loan: Loan | None = None

    def lend(self, job: str, decoder: Decoder, path: Path) -> LoanState:
        """Begin a generation of a job beside weights that were read from `path`.

        One that is at it already, or is over, is left as it is.

        Raises:
            EngineBusyError: another job has the weights, or its base is another.
            InvalidRequestError: the job cannot run beside these weights.
        """
        # Most replicas never lend, and the trainer's modules take memory and time.
        from mizzen.runtime.engine.loan import Loan, read_lent  # noqa: PLC0415

        config = read_lent(job, decoder, path)
        if (loan := self._loan) is not None:
            if loan.is_of(config):
                return loan.state()
            if self.is_lent:
                raise busy(f"The weights are lent to {loan.config.job} already.")
        self._loan = loan = Loan(
            config,
            decoder,
            self._loop.is_wanted,
            spare_bytes=self._spare_bytes,
            step_tokens=self._step_tokens,
            ranks=self._call_ranks(job, decoder.group.size),
        )
        loan.start()
        return loan.state()

    def _call_ranks(self, job: str, size: int) -> "MeetingPoint | None":
        """Have the other ranks begin too; return where they meet, None where there are none."""
        from mizzen.runtime.engine.loan import MeetingPoint  # noqa: PLC0415 - as above

        if size == 1:
            return None
        folder = tempfile.TemporaryDirectory(prefix="mizzen-loan-")
        store = Path(folder.name) / "store"
        message = Lend(job, store, self._step_tokens)
        self._loop.call_between_steps(lambda: self._ranks.announce_loan(message)).result()
        return MeetingPoint(0, size, store, folder)

    def state(self) -> LoanState | None:
        """Return the job that is at it, or the last one; None where there was none."""
        return None if self._loan is None else self._loan.state()

    @property
    def is_lent(self) -> bool:
        """Whether a job is at it."""
        return self._loan is not None and not self._loan.is_over

    @property
    def step(self) -> int | None:
        """The last whole step of the job that is at it, None where none is."""
        return self._loan.step if self._loan is not None and self.is_lent else None

    def ask_to_stop(self) -> None:
        """Have the job commit its last whole step and end."""
        if self._loan is not None:
            self._loan.ask_to_stop()

    def take_back(self) -> None:
        """Have the job end, and block until it holds nothing of the model any more."""
        if self._loan is not None:
            self._loan.ask_to_stop()
            self._loan.wait()
