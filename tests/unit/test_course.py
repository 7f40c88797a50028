"""A rollout's way from the spec's change to its end, or back."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from mizzen.operator.planning.course import (
    Canary,
    Failure,
    GivenUp,
    Look,
    Rollout,
    Rules,
    begin,
    left_s,
    proceed,
)
from mizzen.operator.status.rollout import read_rollout, rollout_document

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
RULES = Rules(deadline_s=100)
UNDER_WAY = Rollout(revision="two", stable="one", moved_at=NOW, serving=1)
GIVEN_UP = replace(UNDER_WAY, failure=Failure(GivenUp.LATE, "why", NOW))
FRESH = Rollout(revision="two", stable="one", moved_at=NOW)

# Rollout so far, the spec's revision, the one in status: the rollout from now on.
BEGINNINGS: dict[str, tuple[Rollout | None, str, str, Rollout | None]] = {
    "a new deployment has no rollout": (None, "two", "", None),
    "nor has one at rest": (None, "two", "two", None),
    "another revision begins one": (None, "two", "one", FRESH),
    "which goes on while the spec says so": (UNDER_WAY, "two", "two", UNDER_WAY),
    "and stays given up while the spec says so": (GIVEN_UP, "two", "one", GIVEN_UP),
    "the revision before ends it": (UNDER_WAY, "one", "two", None),
    "and forgives a failure": (GIVEN_UP, "one", "one", None),
    "a third revision goes back to the last that was whole": (
        UNDER_WAY, "three", "two", replace(FRESH, revision="three"),
    ),
    "a third revision is tried after a failure": (
        GIVEN_UP, "three", "one", replace(FRESH, revision="three"),
    ),
    "one that cannot be made again is no way back": (
        None, "two", "lost", replace(FRESH, stable=""),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("previous", "wanted", "before", "expected"), BEGINNINGS.values(), ids=BEGINNINGS
)
def test_begin(
    previous: Rollout | None, wanted: str, before: str, expected: Rollout | None
) -> None:
    found = begin(previous, wanted=wanted, before=before, known={"one", "two"}, now=NOW)
    assert found == expected


def after(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def look(serving: int = 1, *, is_complete: bool = False, trouble: str = "") -> Look:
    return Look(serving=serving, is_complete=is_complete, trouble=trouble)


DRAINING = replace(look(), is_draining=True)


def test_a_rollout_is_over_when_all_that_is_wanted_serves_with_the_new_revision() -> None:
    complete = look(2, is_complete=True)
    assert proceed(UNDER_WAY, complete, RULES, now=NOW) is None
    assert proceed(UNDER_WAY, replace(complete, is_alone=False), RULES, now=NOW) is None


def test_a_canary_is_not_over_beside_the_replicas_that_it_is_compared_with() -> None:
    rollout = replace(UNDER_WAY, canary=Canary(weight=10, since=NOW))
    complete = look(1, is_complete=True)
    assert proceed(rollout, replace(complete, is_alone=False), RULES, now=NOW) == rollout
    assert proceed(rollout, complete, RULES, now=NOW) is None


def test_each_further_replica_in_service_gives_it_time() -> None:
    moved = proceed(UNDER_WAY, look(2), RULES, now=after(99))
    assert moved == replace(UNDER_WAY, serving=2, moved_at=after(99))


def test_a_replica_that_comes_back_is_no_progress() -> None:
    fallen = proceed(UNDER_WAY, look(0), RULES, now=after(50))
    assert fallen == UNDER_WAY
    assert proceed(fallen, look(1), RULES, now=after(60)) == UNDER_WAY


def test_standing_still_for_too_long_is_a_failure_that_says_why() -> None:
    assert proceed(UNDER_WAY, look(), RULES, now=after(99)) == UNDER_WAY
    failed = proceed(UNDER_WAY, look(trouble="No config.json."), RULES, now=after(100))
    assert failed is not None and failed.failure is not None
    assert failed.target == "one"
    assert failed.failure == Failure(
        GivenUp.LATE,
        "No further replica came into service within 100 seconds "
        "(spec.rollout.progressDeadlineSeconds). No config.json.",
        after(100),
    )
    assert proceed(failed, look(2, is_complete=True), RULES, now=after(999)) == failed


def test_without_a_way_back_it_waits() -> None:
    rollout = replace(UNDER_WAY, stable="")
    assert proceed(rollout, look(), RULES, now=after(9999)) == rollout
    assert left_s(rollout, look(), RULES, now=NOW) is None


def test_a_pause_stops_the_clock() -> None:
    pausing = replace(RULES, is_paused=True)
    paused = proceed(UNDER_WAY, look(), pausing, now=after(90))
    assert paused is not None and paused.is_paused
    assert proceed(paused, look(), pausing, now=after(9999)) == paused
    resumed = proceed(paused, look(), RULES, now=after(9999))
    assert resumed == replace(UNDER_WAY, moved_at=after(9999))


def test_the_clock_stands_still_while_a_replica_drains_and_begins_anew_when_it_has_gone() -> None:
    assert proceed(UNDER_WAY, DRAINING, RULES, now=after(500)) == UNDER_WAY
    assert left_s(UNDER_WAY, DRAINING, RULES, now=after(500)) is None
    gone = replace(look(), has_drained=True)
    assert proceed(UNDER_WAY, gone, RULES, now=after(500)) == replace(
        UNDER_WAY, moved_at=after(500)
    )


def test_where_no_replica_is_wanted_nothing_is_proven_and_no_time_passes() -> None:
    canary = Canary(step=1, weight=10, since=NOW)
    resting = replace(RULES, rests=True)
    rested = proceed(
        replace(UNDER_WAY, canary=canary), look(0, is_complete=True), resting, now=after(50)
    )
    expected = replace(
        UNDER_WAY, canary=replace(canary, since=None), is_paused=True, serving=0, moved_at=after(50)
    )
    assert rested == expected
    assert proceed(expected, look(0, is_complete=True), resting, now=after(9999)) == expected
    woken = proceed(expected, look(0), RULES, now=after(9999))
    assert woken == replace(expected, is_paused=False, moved_at=after(9999))


@pytest.mark.parametrize(
    "rollout", [UNDER_WAY, GIVEN_UP, replace(FRESH, stable="", is_paused=True)]
)
def test_a_restarted_operator_reads_what_was_written(rollout: Rollout) -> None:
    assert read_rollout({"rollout": rollout_document(rollout)}) == rollout
    assert read_rollout({}) is None
