"""Conditions as KEP-1623 has them: what is true now, since when, and for which generation.

`next_conditions` keeps `lastTransitionTime` unless a status flips, so writing the same state twice
writes nothing; `flips` names the changes worth an Event. Must not know a resource kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from mizzen.operator.status.reasons import Reason

Document = dict[str, object]


class ConditionType(StrEnum):
    """Every condition type we write."""

    READY = "Ready"
    ACCEPTED = "Accepted"
    RECONCILING = "Reconciling"  # only while true (kstatus)
    STALLED = "Stalled"  # only while true (kstatus)

    AVAILABLE = "Available"
    PROGRESSING = "Progressing"
    SCALING_ACTIVE = "ScalingActive"
    ADAPTERS_READY = "AdaptersReady"
    DEGRADED = "Degraded"

    ADMITTED = "Admitted"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    EVALUATION_PASSED = "EvaluationPassed"
    PUBLISHED = "Published"
    PROMOTED = "Promoted"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Condition:
    """What is to be said; `status` None means Unknown."""

    type: ConditionType
    status: bool | None
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Flip:
    """A condition whose status changed: worth one Event."""

    type: ConditionType
    status: str
    reason: str
    message: str
    is_warning: bool


# A flip to this status is bad news. A type that is not named here has none.
_BAD_NEWS = {
    ConditionType.READY: "False",
    ConditionType.ACCEPTED: "False",
    ConditionType.AVAILABLE: "False",
    ConditionType.ADAPTERS_READY: "False",
    ConditionType.EVALUATION_PASSED: "False",
    ConditionType.DEGRADED: "True",
    ConditionType.STALLED: "True",
    ConditionType.FAILED: "True",
}

# Of these a new object says False only because it is new.
_NOT_YET = {ConditionType.READY, ConditionType.AVAILABLE, ConditionType.ADAPTERS_READY}


def rfc3339(moment: datetime) -> str:
    """Return the moment as the API server writes times: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_rfc3339(text: str) -> datetime:
    """Return the moment an API time names (with or without fractions of a second)."""
    return datetime.fromisoformat(text)


def next_conditions(
    previous: Iterable[Mapping[str, object]],
    wanted: Sequence[Condition],
    *,
    observed_generation: int,
    now: datetime,
) -> list[Document]:
    """Return the conditions list to write, in the order wanted; types not wanted disappear."""
    before = {str(condition.get("type")): condition for condition in previous}
    return [
        _document(condition, before.get(condition.type.value), observed_generation, now)
        for condition in wanted
    ]


def flips(
    previous: Iterable[Mapping[str, object]],
    current: Iterable[Mapping[str, object]],
    *,
    of: Iterable[ConditionType],
) -> list[Flip]:
    """Return the conditions of these types whose status changed, in the order of the types.

    On an object's first visit only a fault is news: that a new one is not ready yet is none.
    """
    before = {str(condition.get("type")): str(condition.get("status")) for condition in previous}
    after = {str(condition.get("type")): condition for condition in current}
    found: list[Flip] = []
    for type_ in of:
        condition = after.get(type_.value)
        if condition is None or condition["status"] == before.get(type_.value):
            continue
        status = str(condition["status"])
        is_fault = _BAD_NEWS.get(type_) == status
        if not before and (not is_fault or type_ in _NOT_YET):
            continue
        reason, message = str(condition["reason"]), str(condition["message"])
        found.append(Flip(type_, status, reason, message, is_fault))
    return found


def condition_status(conditions: Iterable[Mapping[str, object]], type_: str) -> str | None:
    """Return "True", "False" or "Unknown", or None where there is no such condition."""
    for condition in conditions:
        if condition.get("type") == type_:
            return str(condition.get("status"))
    return None


def _document(
    condition: Condition,
    before: Mapping[str, object] | None,
    observed_generation: int,
    now: datetime,
) -> Document:
    status = "Unknown" if condition.status is None else str(condition.status)
    since: object = rfc3339(now)
    if before is not None and before.get("status") == status and before.get("lastTransitionTime"):
        since = before["lastTransitionTime"]
    return {
        "type": condition.type.value,
        "status": status,
        "observedGeneration": observed_generation,
        "lastTransitionTime": since,
        "reason": condition.reason.value,
        "message": condition.message,
    }
