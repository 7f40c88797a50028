"""The gate for a model that only transformers can compute: its perplexity on the holdout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from mizzen.runtime.train.config import Suite, TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.hugging_face.model import LanguageModel
from mizzen.runtime.train.hugging_face.rows import loss_sum, pad
from mizzen.runtime.train.measures import PERPLEXITY
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.suites.build import check_holdout
from mizzen.runtime.train.suites.exam import Count, Exam


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceSubject:
    """The model that is asked, and what it computes inside of, such as with its adapter off."""

    model: LanguageModel
    precision: Callable[[], AbstractContextManager[object]]


class LossExam(Exam):
    """How well the holdout's labelled tokens are predicted. Its subjects are of the kind above."""

    def __init__(self, suite: Suite, holdout: Sequence[Sample]) -> None:
        super().__init__(suite, PERPLEXITY)
        self._holdout = holdout

    def __len__(self) -> int:
        return len(self._holdout)

    def count(  # type: ignore[override]
        self, subject: HuggingFaceSubject, span: slice, base_answers: Sequence[str] | None
    ) -> Count:
        """Return the summed loss of these samples."""
        samples = self._holdout[span]
        model = subject.model.eval()
        batch = {name: tensor.to(model.device) for name, tensor in pad(samples).items()}
        labels_BT = batch.pop("labels")
        with subject.precision():
            loss = loss_sum(model(**batch, use_cache=False), labels_BT).item()
        return Count(total=loss, weight=float(sum(sample.labels for sample in samples)))


def build_exams(config: TrainConfig, data: Prepared) -> list[LossExam]:
    """Return an exam for each suite of the job.

    Raises:
        JobConfigError: no held-out sample is left.
    """
    suites = config.evaluation.suites
    if suites:
        check_holdout(data)
    samples = [item for item in data.holdout if isinstance(item, Sample)]
    return [LossExam(suite, samples) for suite in suites]
