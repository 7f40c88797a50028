"""Suites that let the model speak: is the answer the reference's, is it better than the base's?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.generate import AT_ONCE, Drawing, draw_answers, drawn_at_once
from mizzen.runtime.train.measures import EXACT_MATCH, WIN_RATE
from mizzen.runtime.train.records import Messages
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.suites.exam import Count, Exam, Question, Subject

Preference = Literal["first", "second", "tie"]


class Judge(Protocol):
    """Says which of two answers is better."""

    def compare(
        self, messages: Messages, pairs: Sequence[tuple[str, str]], stop: Stop
    ) -> list[Preference]:
        """Return the better one of each pair of answers to the same conversation."""
        ...


class Speaker:
    """Draws the likeliest answer, token by token: asked again, a model says the same."""

    def __init__(
        self, suite: Suite, tokenizer: Tokenizer, stop: Stop, *, at_most: int = AT_ONCE
    ) -> None:
        """`at_most` answers are drawn at once."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._rules = Drawing(
            max_new_tokens=suite.max_new_tokens,
            temperature=0.0,
            eos_ids=tokenizer.eos_token_ids,
            at_once=drawn_at_once(at_most),
        )

    def answers(self, subject: Subject, questions: Sequence[Question]) -> list[str]:
        """Return an answer to each question."""
        prompts = [question.prompt for question in questions]
        with subject.precision():
            drawn = draw_answers(
                subject.decoder, prompts, subject.lora, self._rules, seed=0, stop=self._stop
            )
        return [self._tokenizer.decode(token_ids).strip() for token_ids in drawn]


class ExactMatch(Exam):
    """The share of the answers that are the reference's, blanks aside."""

    def __init__(self, suite: Suite, questions: Sequence[Question], speaker: Speaker) -> None:
        super().__init__(suite, EXACT_MATCH)
        self._questions = questions
        self._speaker = speaker

    def __len__(self) -> int:
        return len(self._questions)

    def count(self, subject: Subject, span: slice, base_answers: Sequence[str] | None) -> Count:
        """Return how many of these answers match."""
        asked = self._questions[span]
        answers = self._speaker.answers(subject, asked)
        hits = sum(
            answer.split() == str(question.answer).split()
            for answer, question in zip(answers, asked, strict=True)
        )
        return Count(total=float(hits), weight=float(len(asked)))


class WinRate(Exam):
    """How often a judge prefers the candidate's answer to the base's; a tie is half a win.

    Each pair is shown in both orders: judges favour the place an answer stands at (Zheng et al.,
    2023, section 3.3), and one that changes its mind with the order has none, which is a tie.
    """

    def __init__(
        self,
        suite: Suite,
        questions: Sequence[Question],
        speaker: Speaker,
        judge: Judge,
        stop: Stop,
    ) -> None:
        super().__init__(suite, WIN_RATE)
        self._questions = questions
        self._speaker = speaker
        self._judge = judge
        self._stop = stop

    def __len__(self) -> int:
        return len(self._questions)

    def count(self, subject: Subject, span: slice, base_answers: Sequence[str] | None) -> Count:
        """Return the candidate's wins; the base, against itself, wins half."""
        asked = self._questions[span]
        answers = self._speaker.answers(subject, asked)
        if base_answers is None:
            return Count(total=len(asked) / 2, weight=float(len(asked)), answers=tuple(answers))
        rounds = zip(asked, answers, base_answers[span], strict=True)
        wins = sum(self._win(question, own, base) for question, own, base in rounds)
        return Count(total=wins, weight=float(len(asked)))

    def _win(self, question: Question, own: str, base: str) -> float:
        if own == base:
            return 0.5
        both_orders = [(own, base), (base, own)]
        first, second = self._judge.compare(question.messages, both_orders, self._stop)
        return (_share(first) + 1.0 - _share(second)) / 2


def _share(preference: Preference) -> float:
    """Return how much of a win the answer that stands first has."""
    return {"first": 1.0, "tie": 0.5, "second": 0.0}[preference]
