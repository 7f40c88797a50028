"""The gate: transformers' model predicts the holdout, and our decoder answers questions.

Perplexity needs nothing but the model. Suites that ask are for models that can be served, and ask
the files that a replica would read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

from mizzen.runtime.train.config import Suite, TrainConfig
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.hugging_face.model import LanguageModel
from mizzen.runtime.train.hugging_face.rows import loss_sum, pad
from mizzen.runtime.train.measures import PERPLEXITY
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.suites.build import build_exam, check_holdout
from mizzen.runtime.train.suites.exam import Count, Exam, Subject
from mizzen.runtime.train.surroundings import Surroundings


@dataclass(kw_only=True, eq=False)
class HuggingFaceSubject:
    """The model that is asked, and what it computes inside of, such as with its adapter off."""

    model: LanguageModel
    precision: Callable[[], AbstractContextManager[object]]
    serve: Callable[[], Subject]

    @cached_property
    def served(self) -> Subject:
        """The same model in our decoder; loaded when a suite first needs it."""
        return self.serve()


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


class ServedExam(Exam):
    """An exam that is put to our decoder. Its subjects are of the kind above, too."""

    def __init__(self, exam: Exam) -> None:
        super().__init__(exam.suite, exam.measure)
        self._exam = exam

    def __len__(self) -> int:
        return len(self._exam)

    def count(  # type: ignore[override]
        self, subject: HuggingFaceSubject, span: slice, base_answers: Sequence[str] | None
    ) -> Count:
        """Return what the exam counts."""
        return self._exam.count(subject.served, span, base_answers)


def build_exams(config: TrainConfig, data: Prepared, around: Surroundings | None) -> list[Exam]:
    """Return an exam for each suite; `around` is there where one of them asks questions.

    Raises:
        JobConfigError: no held-out sample is left, or none that can be asked in this way.
    """
    suites = config.evaluation.suites
    if suites:
        check_holdout(data)
    samples = [item for item in data.holdout if isinstance(item, Sample)]
    exams: list[Exam] = []
    for suite in suites:
        if suite.is_question:
            assert around is not None, "made for the suites that need it"
            exams.append(ServedExam(build_exam(suite, around, Sft(), data)))
        else:
            exams.append(LossExam(suite, samples))
    return exams
