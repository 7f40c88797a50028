"""The status of a FineTuneJob, from what was decided and observed. Pure: no clock, no client.

Whether a job has ended is read back from its own status: its pods may be cleaned up long before
the job itself, and a finished job must never train again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from mizzen.operator.planning.generations import (
    AskToYield,
    Finish,
    Generation,
    GiveUp,
    Rest,
    Start,
    Step,
    WaitUntil,
    Watch,
)
from mizzen.operator.status.conditions import (
    Condition,
    ConditionType,
    Document,
    condition_status,
    next_conditions,
)
from mizzen.operator.status.progress import Artifact, Progress
from mizzen.operator.status.reasons import Reason

_AT_WORK = frozenset({"Preparing", "Running", "Evaluating", "Publishing"})


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way; `is_final` where only a new job can cure it."""

    reason: Reason
    message: str
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class Promotion:
    """How far the adapter is on the deployment it was trained for."""

    deployment: str
    adapter: str
    ready_replicas: int
    replicas: int
    problem: Problem | None = None

    @property
    def is_done(self) -> bool:
        """Whether every ready replica answers with the adapter."""
        return self.problem is None and 0 < self.replicas <= self.ready_replicas


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Everything the status says, as values; `output_uri` is where the artifact's claim is."""

    step: Step | None
    newest: Generation | None
    is_suspended: bool
    problem: Problem | None
    progress: Progress | None
    artifact_uri: str | None
    has_suites: bool
    promotion: Promotion | None


def has_ended(status: Mapping[str, object]) -> bool:
    """Whether the job needs no more pods: its artifact is published, or it has failed for good."""
    conditions = _conditions(status)
    return any(
        condition_status(conditions, type_) == "True"
        for type_ in (ConditionType.PUBLISHED, ConditionType.FAILED)
    )


def next_status(
    previous: Mapping[str, object], facts: JobFacts, *, generation: int, now: datetime
) -> Document:
    """Return the whole status document to write; `generation` is the resource's own counter."""
    phase = next_phase(facts, str(previous.get("phase")))
    status: Document = {"observedGeneration": generation, "phase": phase}
    if isinstance(facts.step, Start):
        status["generation"] = facts.step.number
        status["restarts"] = facts.step.crashes
    elif facts.newest is not None:
        status["generation"] = facts.newest.number
        status["restarts"] = _crashes(facts)
    else:
        status.update({key: previous[key] for key in ("generation", "restarts") if key in previous})
    status.update(_progress_fields(previous, facts, phase))
    if facts.promotion is not None:
        status["promotion"] = {
            "adapter": facts.promotion.adapter,
            "readyReplicas": facts.promotion.ready_replicas,
            "replicas": facts.promotion.replicas,
        }
    status["conditions"] = next_conditions(
        _conditions(previous),
        list(_wanted_conditions(facts, phase)),
        observed_generation=generation,
        now=now,
    )
    return status


def next_phase(facts: JobFacts, previous: str) -> str:
    """Return the one word for people; programs read the conditions.

    `previous` is the phase before: a trainer that is silent for a moment is still at it.
    """
    if facts.problem is not None and facts.problem.is_final:
        return "Failed"
    match facts.step:
        case None:
            return "Suspended" if facts.is_suspended else "Pending"
        case GiveUp():
            return "Failed"
        case Rest():
            return "Suspended"
        case AskToYield():
            return "Yielding"
        case Start() | WaitUntil():
            return "Pending"
        case Watch():
            return _running_phase(facts, previous)
        case Finish():
            return _finished_phase(facts)


def _running_phase(facts: JobFacts, previous: str) -> str:
    if facts.progress is not None and facts.progress.phase != "Succeeded":
        return facts.progress.phase
    if facts.problem is not None:
        return "Pending"
    if facts.progress is not None or previous in _AT_WORK:
        return previous if previous in _AT_WORK else "Publishing"
    return "Preparing"


def _finished_phase(facts: JobFacts) -> str:
    if is_evaluation_failed(facts.progress):
        return "Failed"
    if facts.promotion is not None and not facts.promotion.is_done:
        return "Promoting"
    return "Succeeded"


def is_evaluation_failed(progress: Progress | None) -> bool:
    """Whether a suite says that the candidate is worse than its base by more than it may be."""
    return progress is not None and any(not score.is_passed for score in progress.scores)


def published_artifact(facts: JobFacts) -> Artifact | None:
    """Return the artifact once its job is done and its gate is passed."""
    if not isinstance(facts.step, Finish) or facts.progress is None:
        return None
    return None if is_evaluation_failed(facts.progress) else facts.progress.artifact


def _crashes(facts: JobFacts) -> int:
    if isinstance(facts.step, Start | WaitUntil | GiveUp):
        return facts.step.crashes
    return facts.newest.crashes if facts.newest is not None else 0


def _progress_fields(previous: Mapping[str, object], facts: JobFacts, phase: str) -> Document:
    """Return what the trainer reported, or what it had reported before it went away."""
    progress = facts.progress
    if progress is None:
        kept = ("progress", "metrics", "checkpoint", "evaluation", "artifact")
        return {key: previous[key] for key in kept if key in previous}
    numbers = progress.numbers
    fields: Document = {}
    if "step" in numbers:
        report: Document = {"step": int(numbers["step"])}
        if total := int(numbers.get("totalSteps", 0)):
            report["totalSteps"] = total
            report["steps"] = f"{int(numbers['step'])}/{total}"
            report["percent"] = min(100, 100 * int(numbers["step"]) // total)
        if "epoch" in numbers:
            report["epoch"] = round(numbers["epoch"], 2)
        report.update({name: int(numbers[name]) for name in ("tokens",) if name in numbers})
        if phase in _AT_WORK:
            report.update(_pace(numbers))
        fields["progress"] = report
    metrics = {
        name: round(numbers[name], 8 if name == "learningRate" else 4)
        for name in ("loss", "evalLoss", "learningRate")
        if name in numbers
    }
    if metrics:
        fields["metrics"] = metrics
    if progress.checkpoint:
        fields["checkpoint"] = progress.checkpoint
    if progress.scores:
        fields["evaluation"] = [score.to_api() for score in progress.scores]
    if progress.artifact is not None and facts.artifact_uri is not None:
        fields["artifact"] = {
            "uri": facts.artifact_uri,
            "digest": progress.artifact.digest,
            "bytes": progress.artifact.bytes,
            "kind": progress.artifact.kind,
        }
    return fields


def _pace(numbers: Mapping[str, float]) -> Document:
    """Return speed and remaining time, which only a trainer at work has."""
    pace: Document = {}
    if "tokensPerSecond" in numbers:
        pace["tokensPerSecond"] = round(numbers["tokensPerSecond"], 1)
    if "etaSeconds" in numbers:
        eta_s = int(numbers["etaSeconds"])
        pace["etaSeconds"] = eta_s
        pace["eta"] = for_people(eta_s)
    return pace


def for_people(seconds: int) -> str:
    """Return a duration as kubectl prints ages: 45s, 4m10s, 2h5m."""
    hours, rest = divmod(max(0, seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{left}s" if minutes else f"{left}s"


def _wanted_conditions(facts: JobFacts, phase: str) -> Iterable[Condition]:
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
    yield Condition(
        ConditionType.SUCCEEDED, phase == "Succeeded",
        Reason.COMPLETED if phase == "Succeeded" else _reason_of(phase),
        "The job is complete." if phase == "Succeeded" else "The job is not complete.",
    )  # fmt: skip
    yield _failed(facts, phase)
    if phase not in {"Succeeded", "Failed", "Suspended"}:
        yield Condition(
            ConditionType.RECONCILING, True, _reason_of(phase), "The job is on its way."
        )
    if phase == "Failed" or (facts.problem is not None and phase == "Pending"):
        yield _stalled(facts)


def _ready(facts: JobFacts, phase: str) -> Condition:
    if phase == "Succeeded":
        return Condition(ConditionType.READY, True, Reason.COMPLETED, "The job is complete.")
    if phase == "Failed" or facts.problem is not None:
        why = _why_stopped(facts)
        return Condition(ConditionType.READY, False, why.reason, why.message)
    return Condition(ConditionType.READY, False, _reason_of(phase), _SENTENCES[phase])


def _accepted(facts: JobFacts) -> Condition:
    if facts.step is None and facts.problem is not None:
        return Condition(ConditionType.ACCEPTED, False, facts.problem.reason, facts.problem.message)
    return Condition(
        ConditionType.ACCEPTED, True, Reason.VALID, "The job's model, data and output are found."
    )


def _admitted(facts: JobFacts, phase: str) -> Condition:
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


def _running(facts: JobFacts, phase: str) -> Condition:
    is_running = phase in _AT_WORK or phase == "Yielding"
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
            "The result is no worse than its base on every suite; see status.evaluation.",
        )  # fmt: skip
    return Condition(type_, None, Reason.PENDING, "The result has not been evaluated yet.")


def _verdict(facts: JobFacts) -> str:
    assert facts.progress is not None
    names = ", ".join(score.suite for score in facts.progress.scores if not score.is_passed)
    return (
        f"The result is worse than its base on {names} by more than maxRegressionRatio allows; "
        "nothing was published. Change the data or the learning rate and submit a new job."
    )


def _promoted(facts: JobFacts) -> Condition:
    type_ = ConditionType.PROMOTED
    promotion = facts.promotion
    if promotion is None:
        return Condition(type_, None, Reason.NO_PROMOTION, "The result is not to be promoted yet.")
    if promotion.problem is not None:
        return Condition(type_, False, promotion.problem.reason, promotion.problem.message)
    if promotion.is_done:
        return Condition(
            type_, True, Reason.PROMOTED,
            f"Every ready replica of {promotion.deployment} answers as {promotion.adapter}.",
        )  # fmt: skip
    return Condition(
        type_, False, Reason.PROMOTING,
        f"The replicas of {promotion.deployment} are loading the adapter.",
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
    if is_evaluation_failed(facts.progress):
        return Problem(Reason.EVALUATION_FAILED, _verdict(facts), is_final=True)
    if facts.problem is not None:
        return facts.problem
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


def _conditions(status: Mapping[str, object]) -> list[Mapping[str, object]]:
    conditions = status.get("conditions")
    return list(conditions) if isinstance(conditions, list) else []
