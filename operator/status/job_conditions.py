"""The conditions of a FineTuneJob, each with a reason and a sentence. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from mizzen.operator.planning.generations import (
    Finish,
    Queue,
    Rest,
    Watch,
)
from mizzen.operator.planning.lending import Wait
from mizzen.operator.status.conditions import Condition, ConditionType
from mizzen.operator.status.job_facts import (
    AT_WORK,
    JobFacts,
    Problem,
    is_blocked,
    is_evaluation_failed,
    published_artifact,
)
from mizzen.operator.status.progress import Score
from mizzen.operator.status.reasons import Reason


def wanted_conditions(facts: JobFacts, phase: str) -> Iterable[Condition]:
    """Yield the conditions in the order people read them."""
    is_published = published_artifact(facts) is not None
    yield _ready(facts, phase)
    yield _accepted(facts)
    yield _admitted(facts, phase)
    yield _running(facts, phase)
    yield _suspended(facts)
    yield _evaluation(facts)
    yield Condition(
        ConditionType.PUBLISHED, is_published,
        Reason.PUBLISHED if is_published else Reason.NOT_PUBLISHED,
        "The result is published; see status.artifact." if is_published
        else "Nothing is published yet.",
    )  # fmt: skip
    yield _promoted(facts)
    if phase == "Succeeded":
        yield Condition(ConditionType.SUCCEEDED, True, *_completion(facts))
    else:
        yield Condition(
            ConditionType.SUCCEEDED, False, _reason_of(phase), "The job is not complete."
        )
    yield _failed(facts, phase)
    if phase not in {"Succeeded", "Failed", "Suspended"}:
        yield Condition(
            ConditionType.RECONCILING, True, _reason_of(phase), "The job is on its way."
        )
    if phase == "Failed" or (facts.problem is not None and phase == "Pending"):
        yield _stalled(facts)


def _ready(facts: JobFacts, phase: str) -> Condition:
    if phase == "Succeeded":
        return Condition(ConditionType.READY, True, *_completion(facts))
    if phase == "Failed" or facts.problem is not None:
        why = _why_stopped(facts)
        return Condition(ConditionType.READY, False, why.reason, why.message)
    if isinstance(facts.step, Queue):
        return _waits(ConditionType.READY, facts.step.wait)
    return Condition(ConditionType.READY, False, _reason_of(phase), _SENTENCES[phase])


def _completion(facts: JobFacts) -> tuple[Reason, str]:
    """Return why a job is complete, and a sentence: it need not have made all its steps."""
    if facts.progress is None or facts.progress.budget_spent is None:
        return Reason.COMPLETED, "The job is complete."
    return (
        Reason.BUDGET_SPENT,
        f"The job is complete: budget.{facts.progress.budget_spent} ended it before its last step, "
        "and what it had learned by then is the result.",
    )


def _accepted(facts: JobFacts) -> Condition:
    if facts.step is None and facts.problem is not None:
        return Condition(ConditionType.ACCEPTED, False, facts.problem.reason, facts.problem.message)
    return Condition(
        ConditionType.ACCEPTED, True, Reason.VALID, "The job's model, data and output are found."
    )


def _admitted(facts: JobFacts, phase: str) -> Condition:
    if isinstance(facts.step, Queue):
        return _waits(ConditionType.ADMITTED, facts.step.wait)
    if facts.is_giving_back:
        return Condition(
            ConditionType.ADMITTED, False, Reason.YIELDED,
            "Its devices are needed elsewhere; it goes on from its last checkpoint once some are "
            "free again.",
        )  # fmt: skip
    is_admitted = facts.newest is not None and not (
        phase == "Pending" and isinstance(facts.step, Watch)
    )
    if is_admitted:
        return Condition(
            ConditionType.ADMITTED, True, Reason.ADMITTED, "The job got the capacity it asked for."
        )
    problem = facts.problem
    return Condition(
        ConditionType.ADMITTED, False,
        problem.reason if problem else Reason.PENDING,
        problem.message if problem else "The job waits for its pod to be placed.",
    )  # fmt: skip


def _waits(type_: ConditionType, wait: Wait) -> Condition:
    return Condition(type_, False, Reason(wait.hold.value), wait.message)


def _running(facts: JobFacts, phase: str) -> Condition:
    is_running = phase in AT_WORK or phase == "Yielding"
    return Condition(
        ConditionType.RUNNING, is_running,
        _reason_of(phase),
        "A trainer is at work." if is_running else "No trainer is at work.",
    )  # fmt: skip


def _suspended(facts: JobFacts) -> Condition:
    is_resting = isinstance(facts.step, Rest) or (facts.step is None and facts.is_suspended)
    if is_resting:
        return Condition(
            ConditionType.SUSPENDED, True, Reason.SUSPENDED,
            "Suspended by spec.suspend; set it to false to go on from the last checkpoint.",
        )  # fmt: skip
    return Condition(
        ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED, "The job is not suspended."
    )


def _evaluation(facts: JobFacts) -> Condition:
    type_ = ConditionType.EVALUATION_PASSED
    if not facts.has_suites:
        if published_artifact(facts) is not None:
            return Condition(type_, True, Reason.NO_EVALUATION, "The job names no suite to pass.")
        return Condition(type_, None, Reason.NO_EVALUATION, "The job names no suite to pass.")
    if is_evaluation_failed(facts.progress):
        return Condition(type_, False, Reason.EVALUATION_FAILED, _verdict(facts))
    if facts.progress is not None and facts.progress.scores and isinstance(facts.step, Finish):
        return Condition(
            type_, True, Reason.EVALUATION_PASSED,
            f"The result passes every suite: {_figures(facts.progress.scores)}.",
        )  # fmt: skip
    return Condition(type_, None, Reason.PENDING, "The result has not been evaluated yet.")


def _verdict(facts: JobFacts) -> str:
    assert facts.progress is not None
    failed = [score for score in facts.progress.scores if not score.is_passed]
    verdict = f"The result is worse than maxRegressionRatio allows: {_figures(failed)}."
    if not isinstance(facts.step, Finish):
        return verdict
    if is_blocked(facts.progress):
        return (
            f"{verdict} Nothing was published. Change the data or the learning rate and submit a "
            "new job."
        )
    return f"{verdict} It was published all the same, as evaluation.onFail is Warn."


def _figures(scores: Iterable[Score]) -> str:
    """Return what was measured, as people read it: `holdout 13.91 (base 14.7)`."""
    return ", ".join(f"{s.suite} {s.candidate:.4g} (base {s.base:.4g})" for s in scores)


def _promoted(facts: JobFacts) -> Condition:
    type_ = ConditionType.PROMOTED
    promotion = facts.promotion
    if promotion is None:
        return Condition(type_, None, Reason.NO_PROMOTION, "The result is not to be promoted yet.")
    if promotion.problem is not None:
        return Condition(type_, False, promotion.problem.reason, promotion.problem.message)
    if promotion.replaced_by is not None:
        return Condition(
            type_, False, Reason.REPLACED,
            f"{promotion.served_as} is now the result of job {promotion.replaced_by}.",
        )  # fmt: skip
    if promotion.is_done:
        return Condition(
            type_, True, Reason.PROMOTED,
            f"{promotion.deployment} serves the result as {promotion.served_as}.",
        )  # fmt: skip
    return Condition(
        type_, False, Reason.PROMOTING,
        f"The replicas of {promotion.deployment} are loading the result.",
    )  # fmt: skip


def _failed(facts: JobFacts, phase: str) -> Condition:
    if phase != "Failed":
        return Condition(ConditionType.FAILED, False, Reason.AS_EXPECTED, "The job has not failed.")
    why = _why_stopped(facts)
    return Condition(ConditionType.FAILED, True, why.reason, why.message)


def _stalled(facts: JobFacts) -> Condition:
    why = _why_stopped(facts)
    return Condition(ConditionType.STALLED, True, why.reason, why.message)


def _why_stopped(facts: JobFacts) -> Problem:
    if is_blocked(facts.progress):
        return Problem(Reason.EVALUATION_FAILED, _verdict(facts), is_final=True)
    if facts.problem is not None:
        return facts.problem
    if facts.promotion is not None and facts.promotion.problem is not None:
        return facts.promotion.problem
    return Problem(
        Reason.BACKOFF_LIMIT_EXCEEDED,
        "The trainer crashed more often than failure.backoffLimit allows; see its last log with "
        "`kubectl logs -l mizzen.dev/job`.",
        is_final=True,
    )


_SENTENCES = {
    "Pending": "The job waits for its pod to run.",
    "Preparing": "The trainer reads the model and the data.",
    "Running": "The trainer is at work; see status.progress.",
    "Yielding": "The trainer commits a checkpoint and leaves.",
    "Evaluating": "The result is measured against its base.",
    "Publishing": "The result is being written to its volume.",
    "Promoting": "The result is being loaded into the deployment.",
    "Suspended": "Suspended by spec.suspend.",
}

_PHASE_REASONS = {
    "Pending": Reason.PENDING,
    "Preparing": Reason.PREPARING,
    "Running": Reason.RUNNING,
    "Yielding": Reason.YIELDING,
    "Evaluating": Reason.EVALUATING,
    "Publishing": Reason.PUBLISHING,
    "Promoting": Reason.PROMOTING,
    "Suspended": Reason.SUSPENDED,
    "Succeeded": Reason.COMPLETED,
    "Failed": Reason.FINISHED,
}


def _reason_of(phase: str) -> Reason:
    return _PHASE_REASONS.get(phase, Reason.PENDING)
