"""Accuracy by label likelihood: which of the labels does the model find the likeliest answer?

Nothing is generated, so that a model that would say more than the label is not punished for it.
The idea of a verbalizer: OpenPrompt (Ding et al., 2022).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train.batches import pack, sum_by_sample
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.measures import ACCURACY
from mizzen.runtime.train.methods.token_loss import token_log_probs
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.suites.exam import Count, Exam, Question, Subject

MAX_LABELS = 32


class Classification(Exam):
    """The share of the questions whose likeliest label is the true one."""

    def __init__(
        self,
        suite: Suite,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        at_once: int,
    ) -> None:
        super().__init__(suite, ACCURACY)
        self._labels = choose_labels(suite, questions)
        self._tokenizer = tokenizer
        self._at_once = AtOnce(at_once)
        rendered = ((q, [self._sample(q, label) for label in self._labels]) for q in questions)
        self._asked = [
            (question, samples)
            for question, samples in rendered
            if max(map(len, samples)) <= max_tokens
        ]
        if not self._asked:
            raise JobConfigError(
                f"Suite {suite.name} has no held-out sample that fits into {max_tokens} tokens. "
                "Raise processing.maxSeqLen."
            )

    def __len__(self) -> int:
        return len(self._asked)

    def count(self, subject: Subject, span: slice, base_answers: Sequence[str] | None) -> Count:
        """Return how many of these questions got their true label."""
        asked = self._asked[span]
        samples = [sample for _, versions in asked for sample in versions]

        def score(part: Sequence[Sample], _: int) -> list[float]:
            batch = pack(part, subject.decoder.place.device)
            with subject.precision():
                log_probs_N = token_log_probs(subject.decoder, batch, subject.lora)
            return [*sum_by_sample(batch, log_probs_N).tolist()]

        scores = self._at_once.in_parts(samples, score, ranks=subject.decoder.group.size)
        chosen = np.asarray(scores).reshape(len(asked), len(self._labels)).argmax(axis=1)
        hits = sum(
            self._labels[label] == question.answer
            for label, (question, _) in zip(chosen, asked, strict=True)
        )
        return Count(total=float(hits), weight=float(len(asked)))

    def _sample(self, question: Question, label: str) -> Sample:
        """Return the conversation that ends in this label, of which only the label is scored."""
        answered = (*question.messages, {"role": "assistant", "content": label})
        token_ids, is_assistant = self._tokenizer.render_for_training(answered)
        is_label_T = np.asarray(is_assistant, dtype=np.bool_)
        # What the assistant said earlier is the same for every label.
        is_label_T[: len(question.prompt)] = False
        return Sample(np.asarray(token_ids, dtype=np.int32), is_label_T)


def choose_labels(suite: Suite, questions: Sequence[Question]) -> tuple[str, ...]:
    """Return the labels to tell apart: as written in the suite, else the answers there are.

    Raises:
        JobConfigError: an answer is none of the labels, or there are too many to be labels.
    """
    answers = sorted({str(question.answer) for question in questions})
    if suite.labels:
        if strange := [answer for answer in answers if answer not in suite.labels]:
            raise JobConfigError(
                f"Suite {suite.name} has the labels {', '.join(suite.labels)}, but a held-out "
                f"sample's answer is {strange[0][:80]!r}. Correct evaluation.suites[].labels or "
                "the data."
            )
        return suite.labels
    if not 2 <= len(answers) <= MAX_LABELS:
        raise JobConfigError(
            f"Suite {suite.name} finds {len(answers)} different answers in the held-out samples, "
            f"and classification tells 2 to {MAX_LABELS} apart. Name them in "
            "evaluation.suites[].labels, or use another type of suite."
        )
    return tuple(answers)
