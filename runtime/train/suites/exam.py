"""What all suites have in common: questions in a fixed order, put to a model a few at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.measures import Measure
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.records import Conversation, Messages
from mizzen.runtime.train.samples import Item, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model that is asked."""

    decoder: Decoder
    lora: LoraDelta | None = None
    precision: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """What some questions added to a suite's figure; `answers` only where they are needed later."""

    total: float
    weight: float
    answers: tuple[str, ...] = ()


class Exam(ABC):
    """One suite over the whole holdout."""

    def __init__(self, suite: Suite, measure: Measure) -> None:
        self.suite = suite
        self.measure = measure

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of its questions."""

    @abstractmethod
    def count(self, subject: Subject, span: slice, base_answers: Sequence[str] | None) -> Count:
        """Put the questions in `span`; `base_answers` is None where the base itself is asked.

        Raises:
            YieldRequested: somebody asked to stop; these questions are put again.
        """


class MethodExam(Exam):
    """The measure that belongs to the job's method, over the samples as they are trained on."""

    def __init__(self, suite: Suite, method: Method, holdout: Sequence[Item]) -> None:
        super().__init__(suite, method.measure)
        self._method = method
        self._holdout = holdout

    def __len__(self) -> int:
        return len(self._holdout)

    def count(self, subject: Subject, span: slice, base_answers: Sequence[str] | None) -> Count:
        """Return the method's own sum over these samples."""
        with subject.precision():
            total, weight = self._method.count(subject.decoder, self._holdout[span], subject.lora)
        return Count(total=total, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A conversation up to where the assistant speaks, and what it said there, if known."""

    messages: Messages
    prompt: Prompt
    place: str

    @property
    def answer(self) -> str | None:
        """The reference answer."""
        return self.prompt.answer


def questions_of(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, *, max_tokens: int
) -> list[Question]:
    """Return what the held-out samples ask; those that leave no room for an answer are left out."""
    questions: list[Question] = []
    for conversation in conversations:
        messages, answer = conversation.messages, conversation.answer
        if messages[-1]["role"] == "assistant":
            answer, messages = str(messages[-1]["content"]), messages[:-1]
        if not messages:
            continue
        token_ids = np.asarray(tokenizer.apply_chat_template(messages), dtype=np.int32)
        if len(token_ids) < max_tokens:
            prompt = Prompt(token_ids, answer)
            questions.append(Question(messages=messages, prompt=prompt, place=conversation.place))
    return questions
