"""A job's next step, read as a table."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Finish,
    Generation,
    GiveUp,
    Outcome,
    Range,
    Rest,
    Shrink,
    Start,
    WaitUntil,
    Watch,
    backoff_s,
    decide_generation,
    may_grow,
    outcome_of_group,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LONG_AGO = NOW - timedelta(hours=1)

CASES = {
    "starts with generation 1": (None, False, Start(1, 0)),
    "starts nothing while suspended": (None, True, Rest()),
    "watches a running generation": (Generation(1, Outcome.RUNNING), False, Watch()),
    "watches a pending generation": (Generation(1, Outcome.PENDING), False, Watch()),
    "asks a running generation to yield when suspended": (
        Generation(1, Outcome.RUNNING), True, AskToYield(),
    ),
    "goes on after a yield": (Generation(3, Outcome.YIELDED, 1), False, Start(4, 1)),
    "rests after a yield while suspended": (Generation(3, Outcome.YIELDED), True, Rest()),
    "a lost node costs no crash": (Generation(2, Outcome.LOST, 1), False, Start(3, 1)),
    "a crash starts the next generation once its wait is over": (
        Generation(2, Outcome.CRASHED, 0, LONG_AGO), False, Start(3, 1),
    ),
    "a fresh crash waits": (
        Generation(2, Outcome.CRASHED, 0, NOW), False,
        WaitUntil(NOW + timedelta(seconds=10), 1),
    ),
    "gives up past the back-off limit": (
        Generation(5, Outcome.CRASHED, 2, LONG_AGO), False, GiveUp(3),
    ),
    "bad configuration is not tried again": (
        Generation(1, Outcome.REJECTED), False, GiveUp(0),
    ),
    "bad configuration ends a suspended job too": (
        Generation(1, Outcome.REJECTED), True, GiveUp(0),
    ),
    "finishes": (Generation(4, Outcome.DONE), False, Finish()),
    "finishes even when suspended at the last moment": (
        Generation(4, Outcome.DONE), True, Finish(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("newest", "suspended", "expected"), CASES.values(), ids=CASES)
def test_decide_generation(newest: Generation | None, suspended: bool, expected: object) -> None:
    step = decide_generation(newest, is_suspended=suspended, backoff_limit=2, now=NOW)
    assert step == expected


@given(st.lists(st.sampled_from([Outcome.CRASHED, Outcome.YIELDED, Outcome.LOST]), max_size=40))
def test_crashes_are_bounded_and_numbers_only_grow(outcomes: list[Outcome]) -> None:
    newest = None
    crashes = 0
    for outcome in outcomes:
        step = decide_generation(newest, is_suspended=False, backoff_limit=3, now=NOW)
        if isinstance(step, GiveUp):
            assert step.crashes == 4
            return
        assert isinstance(step, Start)
        assert step.number == (newest.number if newest else 0) + 1
        assert step.crashes == crashes
        newest = Generation(step.number, outcome, step.crashes, LONG_AGO)
        crashes += outcome is Outcome.CRASHED
    assert crashes <= 4


def test_backoff_doubles_up_to_five_minutes() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 6, 60)] == [10, 20, 40, 300, 300]


def group(outcome: Outcome, *, workers: int = 3, placed: int = 3, age_s: int = 300) -> Generation:
    created_at = NOW - timedelta(seconds=age_s)
    return Generation(4, outcome, 1, LONG_AGO, workers, placed, created_at)


def shared(outcome: Outcome, *, placed: int = 4, tensor: int = 2) -> Generation:
    return replace(group(outcome, workers=4, placed=placed), tensor=tensor)


TWO_TO_FOUR = Range(2, 4)
GROUPS = {
    "starts with as many workers as it may have": (None, Start(1, 0, 4)),
    "starts again with as many": (group(Outcome.YIELDED), Start(5, 1, 4)),
    "starts again with as many after a crash": (group(Outcome.CRASHED), Start(5, 2, 4)),
    "watches fewer than it may have": (group(Outcome.RUNNING, workers=2), Watch()),
    "takes the room there is": (group(Outcome.PENDING, workers=4), Shrink(5, 1, 3)),
    "gives the scheduler time": (group(Outcome.PENDING, workers=4, age_s=20), Watch()),
    "waits for room for the fewest": (group(Outcome.PENDING, workers=4, placed=1), Watch()),
    "waits for images where all have a node": (group(Outcome.PENDING), Watch()),
    "yields to start with more": (group(Outcome.RUNNING, workers=1), AskToYield()),
    "yields to start with fewer": (group(Outcome.RUNNING, workers=5), AskToYield()),
    "has the last ones follow": (group(Outcome.ENDING), Dismiss()),
}


@pytest.mark.parametrize(("newest", "expected"), GROUPS.values(), ids=GROUPS)
def test_decide_generation_of_several_workers(newest: Generation | None, expected: object) -> None:
    step = decide_generation(
        newest, is_suspended=False, backoff_limit=2, now=NOW, workers=TWO_TO_FOUR
    )
    assert step == expected


GROWING = {
    "after some minutes with fewer than it can use": (group(Outcome.RUNNING, workers=2), True),
    "with all it can use never": (group(Outcome.RUNNING, workers=4), False),
    "in its first minutes not": (group(Outcome.RUNNING, workers=2, age_s=299), False),
    "before it runs not": (group(Outcome.PENDING, workers=2), False),
    "without a generation not": (None, False),
}


@pytest.mark.parametrize(("newest", "expected"), GROWING.values(), ids=GROWING)
def test_a_job_may_grow(newest: Generation | None, expected: bool) -> None:
    assert may_grow(newest, TWO_TO_FOUR, now=NOW) is expected


PAIRS = Range(2, 4, tensor=2)
COPIES = {
    "takes the room there is for whole copies": (
        shared(Outcome.PENDING, placed=3),
        Shrink(5, 1, 2),
    ),
    "waits for room for a whole copy": (shared(Outcome.PENDING, placed=1), Watch()),
    "watches copies that are shared as wanted": (shared(Outcome.RUNNING), Watch()),
    "yields to share copies in another way": (shared(Outcome.RUNNING, tensor=1), AskToYield()),
}


@pytest.mark.parametrize(("newest", "expected"), COPIES.values(), ids=COPIES)
def test_decide_generation_of_workers_that_share_copies(
    newest: Generation, expected: object
) -> None:
    step = decide_generation(newest, is_suspended=False, backoff_limit=2, now=NOW, workers=PAIRS)
    assert step == expected


OUTCOMES = {
    "runs once all run": ("running running", Outcome.RUNNING),
    "is pending while one is": ("running pending", Outcome.PENDING),
    "runs on while the leader evaluates": ("running done done", Outcome.RUNNING),
    "is done with its leader": ("done done", Outcome.DONE),
    "is ending while one is left": ("running lost", Outcome.ENDING),
    "waits for the leader's last commit": ("running yielded", Outcome.ENDING),
    "has yielded with its leader": ("yielded left", Outcome.YIELDED),
    "has yielded with any worker": ("left yielded", Outcome.YIELDED),
    "is lost with one of them": ("left lost", Outcome.LOST),
    "crashed with one of them": ("left crashed", Outcome.CRASHED),
    "crashed although others were taken away": ("lost crashed", Outcome.CRASHED),
    "is rejected by one of them": ("left rejected", Outcome.REJECTED),
    "crashed if they never met": ("left left", Outcome.CRASHED),
}


@pytest.mark.parametrize(("pods", "expected"), OUTCOMES.values(), ids=OUTCOMES)
def test_a_generation(pods: str, expected: Outcome) -> None:
    assert outcome_of_group([Outcome(word) for word in pods.split()]) is expected
