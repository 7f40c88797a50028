"""Lends the served weights to one training job at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mizzen.runtime.engine.api import LoanState
from mizzen.runtime.engine.idle import busy
from mizzen.runtime.model.decoder import Decoder

if TYPE_CHECKING:
    from mizzen.runtime.engine.loan import Loan
    from mizzen.runtime.engine.loop import Loop


class Lender:
    """Knows the job that has the weights, or had them last. Its calls come one at a time."""

    def __init__(self, loop: "Loop", *, spare_bytes: Callable[[], int]) -> None:
        """Make one; whoever wants the loop comes before a job.

        `spare_bytes` is the memory beside the model and its cache, for jobs and for the loop's own
        steps.
        """
        self._is_wanted, self._spare_bytes = loop.is_wanted, spare_bytes
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
            self._is_wanted,
            spare_bytes=self._spare_bytes,
            step_tokens=self._step_tokens,
        )
        loan.start()
        return loan.state()

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
