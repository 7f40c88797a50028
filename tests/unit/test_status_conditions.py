"""Conditions keep their time unless they flip, and only flips are news."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from mizzen.operator.status.conditions import (
    Condition,
    ConditionType,
    flips,
    next_conditions,
    parse_rfc3339,
    rfc3339,
)
from mizzen.operator.status.reasons import Reason

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
READY = Condition(ConditionType.READY, True, Reason.IN_SERVICE, "1 of 1 replica is in service.")
NOT_READY = Condition(ConditionType.READY, False, Reason.STARTING, "It is starting.")


def written(*conditions: Condition, at: datetime = NOW) -> list[dict[str, object]]:
    return next_conditions([], conditions, observed_generation=1, now=at)


def test_the_same_state_gives_the_same_document_at_any_time() -> None:
    first = written(READY)
    assert next_conditions(first, [READY], observed_generation=1, now=LATER) == first


def test_a_flip_gets_a_new_time_and_another_reason_does_not() -> None:
    first = written(NOT_READY)
    other = Condition(ConditionType.READY, False, Reason.NOT_A_MODEL, "No config.json.")
    (kept,) = next_conditions(first, [other], observed_generation=2, now=LATER)
    assert (kept["lastTransitionTime"], kept["reason"]) == (rfc3339(NOW), "NotAModel")
    (flipped,) = next_conditions(first, [READY], observed_generation=2, now=LATER)
    assert flipped["lastTransitionTime"] == rfc3339(LATER)


def test_a_condition_that_is_only_there_while_true_disappears() -> None:
    stalled = Condition(ConditionType.STALLED, True, Reason.NOT_A_MODEL, "No config.json.")
    first = written(NOT_READY, stalled)
    left = next_conditions(first, [READY], observed_generation=1, now=LATER)
    assert [condition["type"] for condition in left] == ["Ready"]


def test_what_is_not_known_yet_says_unknown() -> None:
    unknown = Condition(ConditionType.PROMOTED, None, Reason.PENDING, "Nothing yet.")
    assert written(unknown)[0]["status"] == "Unknown"


DEGRADED = Condition(ConditionType.DEGRADED, True, Reason.NOT_A_MODEL, "No config.json.")
HEALTHY = Condition(ConditionType.DEGRADED, False, Reason.AS_EXPECTED, "Nothing is wrong.")
NEWS: dict[str, tuple[list[Condition], list[Condition], list[tuple[str, str, bool]]]] = {
    "becoming ready is news": ([NOT_READY], [READY], [("Ready", "True", False)]),
    "becoming unready is a warning": ([READY], [NOT_READY], [("Ready", "False", True)]),
    "the same again is none": ([READY], [READY], []),
    "that a new object is not ready yet is none": ([], [NOT_READY], []),
    "a fault of a new object is": ([], [NOT_READY, DEGRADED], [("Degraded", "True", True)]),
    "the end of a fault is": ([DEGRADED], [HEALTHY], [("Degraded", "False", False)]),
    "a first good word is none": ([], [READY, HEALTHY], []),
}


@pytest.mark.parametrize(("before", "after", "expected"), NEWS.values(), ids=NEWS)
def test_news(
    before: list[Condition], after: list[Condition], expected: list[tuple[str, str, bool]]
) -> None:
    types = (ConditionType.READY, ConditionType.DEGRADED)
    found = flips(written(*before), written(*after), of=types)
    assert [(flip.type.value, flip.status, flip.is_warning) for flip in found] == expected


def test_times_are_written_in_utc_and_read_back() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=9)))
    assert rfc3339(elsewhere) == "2026-09-01T12:00:00Z"
    assert parse_rfc3339(rfc3339(elsewhere)) == NOW
    assert parse_rfc3339("2026-09-01T12:00:00.123456Z") > NOW
