"""The exams a job's suites name."""

from __future__ import annotations

from collections.abc import Sequence

from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.suites.answers import ExactMatch, Judge, Speaker, WinRate
from mizzen.runtime.train.suites.classification import Classification
from mizzen.runtime.train.suites.exam import Exam, MethodExam, Question, questions_of
from mizzen.runtime.train.suites.judge import HttpJudge, SharedJudge
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.together import Together


def build_exams(around: Surroundings, method: Method, data: Prepared) -> list[Exam]:
    """Return an exam for each suite of the job.

    Raises:
        JobConfigError: the held-out samples cannot be asked in this way.
    """
    suites = around.config.evaluation.suites
    if suites:
        check_holdout(data)
    return [build_exam(suite, around, method, data) for suite in suites]


def build_validation(method: Method, data: Prepared) -> Exam:
    """Return what checkpoints are compared by: the measure that belongs to the method.

    Raises:
        JobConfigError: no held-out sample is left.
    """
    check_holdout(data)
    suite = Suite(name="validation", type=method.measure.type)
    return MethodExam(suite, method, data.holdout)


def check_holdout(data: Prepared) -> None:
    """Raise JobConfigError unless there is a held-out sample to ask."""
    if not data.holdout:
        raise JobConfigError(
            f"None of the held-out samples is left: {data.contaminated} are too much like "
            "training samples. Raise processing.holdoutRatio or add data."
        )


def build_exam(suite: Suite, around: Surroundings, method: Method, data: Prepared) -> Exam:
    """Return one suite's exam; see `build_exams` for errors."""
    if suite.type == method.measure.type:
        return MethodExam(suite, method, data.holdout)
    config, tokenizer = around.config, around.tokenizer
    max_tokens = min(config.processing.max_seq_len, around.spec.max_len)
    questions = questions_of(data.held_out, tokenizer, max_tokens=max_tokens)
    if suite.type != "winRate":
        questions = [question for question in questions if question.answer is not None]
    if not questions:
        raise JobConfigError(
            f"Suite {suite.name} of type {suite.type} finds no held-out sample with a question "
            "and an answer that fit. Raise processing.holdoutRatio or processing.maxSeqLen."
        )
    if suite.type == "classification":
        return Classification(
            suite,
            questions,
            tokenizer,
            max_tokens=max_tokens,
            at_once=config.hyperparameters.micro_batch,
        )
    return _spoken(suite, questions, around)


def _spoken(suite: Suite, questions: Sequence[Question], around: Surroundings) -> Exam:
    speaker = Speaker(suite, around.tokenizer, around.stop, at_most=around.draw_at_most)
    if suite.type == "exactMatch":
        return ExactMatch(suite, questions, speaker)
    where = around.config.evaluation.judge
    assert where is not None, "checked by the job's configuration"
    judge: Judge = HttpJudge(where, api_key=around.judge_api_key)
    if around.workers.tensor.size > 1:
        judge = SharedJudge(judge, Together(around.workers.tensor, around.device))
    return WinRate(suite, questions, speaker, judge, around.stop)
