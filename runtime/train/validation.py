"""Which checkpoints are best: the method's measure over the holdout, at every step that is due.

What is counted is kept, like the gate's answers: a job that yields goes on with the question it
stood at, and the best of a run that was interrupted are those of one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from mizzen.runtime.train.evaluate import Examination
from mizzen.runtime.train.suites.exam import Exam, Subject


class Checkpoints(Protocol):
    """The committed steps of a job."""

    def steps(self) -> list[int]:
        """Return them, oldest first."""
        ...

    def protect(self, steps: Iterable[int]) -> None:
        """Keep these steps beside the last ones, however old they are, and no others."""
        ...

    def prune(self) -> None:
        """Remove what is neither among the last nor protected."""
        ...


class Validation:
    """Measures the committed steps of one job and has the store keep the best of them."""

    def __init__(
        self,
        exam: Exam,
        examination: Examination,
        checkpoints: Checkpoints,
        *,
        keep: int,
        subject: Callable[[], Subject],
    ) -> None:
        self._exam = exam
        self._examination = examination
        self._checkpoints = checkpoints
        self._keep = keep
        self._subject = subject
        self._protect()

    def measure(self, step: int) -> dict[str, float]:
        """Put the holdout to the weights as they are after `step`, which is committed.

        Returns:
            The mean by its name in the curve: `loss`, or `reward` where more is better.

        Raises:
            YieldRequested: somebody asked to stop; what was counted is kept.
        """
        if not self._is_measured(step):
            self._examination.tally(_name(step), self._exam, self._subject(), base=None)
        self._protect()
        self._checkpoints.prune()
        measure = self._exam.measure
        name = measure.type if measure.is_higher_better else "loss"
        return {name: self._examination.store.get(_name(step)).mean}

    def best_first(self) -> list[int]:
        """Return the measured steps that are still there, best first; of equals the earlier."""
        steps = filter(self._is_measured, self._checkpoints.steps())
        return sorted(steps, key=lambda step: (self._cost(step), step))

    def _protect(self) -> None:
        self._checkpoints.protect(self.best_first()[: self._keep])

    def _is_measured(self, step: int) -> bool:
        return self._examination.store.get(_name(step)).samples == len(self._exam)

    def _cost(self, step: int) -> float:
        tally, measure = self._examination.store.get(_name(step)), self._exam.measure
        value = measure.value(tally.total, tally.weight)
        return -value if measure.is_higher_better else value


def _name(step: int) -> str:
    return f"step-{step:08d}/validation"
