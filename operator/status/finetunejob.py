"""The status of a FineTuneJob, from what was decided and observed. Pure: no clock, no client.

Whether a job has ended is read back from its own status: its pods may be cleaned up long before
the job itself, and a finished job must never train again.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Fence,
    Finish,
    GiveUp,
    Queue,
    Rest,
    Start,
    WaitUntil,
    Watch,
)
from mizzen.operator.status.conditions import (
    ConditionType,
    Document,
    condition_status,
    next_conditions,
)
from mizzen.operator.status.job_conditions import wanted_conditions
from mizzen.operator.status.job_facts import AT_WORK, JobFacts, is_blocked

_YIELD_FIELDS = ("lastYieldSeconds", "slowestYieldSeconds")


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
        status["workers"] = facts.step.workers
        status["restarts"] = facts.step.crashes
    elif facts.newest is not None:
        status["generation"] = facts.newest.number
        status["workers"] = facts.newest.workers
        status["restarts"] = _crashes(facts)
    else:
        status.update(
            {k: previous[k] for k in ("generation", "workers", "restarts") if k in previous}
        )
    if (lending := _lending_fields(previous, facts)) is not None:
        status["lending"] = lending
    status.update(_progress_fields(previous, facts, phase))
    if facts.promotion is not None:
        status["promotion"] = facts.promotion.to_api()
    status["conditions"] = next_conditions(
        _conditions(previous),
        list(wanted_conditions(facts, phase)),
        observed_generation=generation,
        now=now,
    )
    return status


def _lending_fields(previous: Mapping[str, object], facts: JobFacts) -> Document | None:
    """Return what the job got and gave back, or what is known of it after its end."""
    known = previous.get("lending")
    before = known if isinstance(known, dict) else {}
    if facts.lending is None:
        return before or None
    fields: Document = {"preemptions": facts.lending.preemptions}
    if facts.lending.nodes:
        fields["nodes"] = list(facts.lending.nodes)
    if facts.lending.replica:
        fields |= {"replica": facts.lending.replica, "crashes": facts.lending.crashes}
    measures = {key: before[key] for key in _YIELD_FIELDS if key in before}
    if (yield_s := facts.lending.yield_s) is not None:
        slowest = max(yield_s, float(before.get("slowestYieldSeconds", 0.0)))
        measures = {"lastYieldSeconds": yield_s, "slowestYieldSeconds": slowest}
    return fields | measures


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
        case AskToYield() | Fence():
            return "Yielding"
        case Start() | Queue() | WaitUntil():
            return "Pending"
        case Dismiss() if facts.is_giving_back:
            return "Yielding"
        case Watch() | Dismiss():
            return _running_phase(facts, previous)
        case Finish():
            return _finished_phase(facts)


def _running_phase(facts: JobFacts, previous: str) -> str:
    if facts.progress is not None and facts.progress.phase != "Succeeded":
        return facts.progress.phase
    if facts.problem is not None:
        return "Pending"
    if facts.progress is not None or previous in AT_WORK:
        return previous if previous in AT_WORK else "Publishing"
    return "Preparing"


def _finished_phase(facts: JobFacts) -> str:
    if is_blocked(facts.progress) or (facts.promotion and facts.promotion.has_failed):
        return "Failed"
    if facts.promotion is not None and not facts.promotion.is_done:
        return "Promoting"
    return "Succeeded"


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
        if "tokens" in numbers:
            report["tokens"] = int(numbers["tokens"])
        if skipped := int(numbers.get("skippedSamples", 0)):
            report["skippedSamples"] = skipped
        if progress.budget_spent:
            report["budgetSpent"] = progress.budget_spent
        if phase in AT_WORK:
            report.update(_pace(numbers))
        fields["progress"] = report
    metrics = {
        name: round(numbers[name], 8 if name == "learningRate" else 4)
        for name in ("loss", "evalLoss", "learningRate", "reward", "kl")
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
            **({"copies": list(facts.copies)} if facts.copies else {}),
        }
    return fields


def _pace(numbers: Mapping[str, float]) -> Document:
    """Return speed and remaining time, which only a trainer at work has."""
    pace: Document = {}
    if "tokensPerSecond" in numbers:
        pace["tokensPerSecond"] = round(numbers["tokensPerSecond"], 1)
    if "mfuRatio" in numbers:
        pace["mfuRatio"] = round(numbers["mfuRatio"], 4)
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


def _conditions(status: Mapping[str, object]) -> list[Mapping[str, object]]:
    conditions = status.get("conditions")
    return list(conditions) if isinstance(conditions, list) else []
