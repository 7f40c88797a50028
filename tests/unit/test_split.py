"""Two revisions side by side, as a table and as properties of whole walks."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.operator.planning.rollout import Budget, Creation, Replica, Standing, Step
from mizzen.operator.planning.split import Split, canary_split, paused_split, split_step

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
SURGE = Budget(surge=1, unavailable=0)
S = Standing


def old(slot: int, standing: Standing = S.IN_SERVICE) -> Replica:
    return Replica(slot, "old", standing)


def new(slot: int, standing: Standing = S.IN_SERVICE) -> Replica:
    return Replica(slot, "new", standing)


def canary(weight: int, desired: int) -> Split:
    return canary_split("new", "old", weight=weight, desired=desired)


def step(replicas: list[Replica], split: Split, desired: int, now: datetime = NOW) -> Step:
    return split_step(replicas, split=split, desired=desired, budget=SURGE, now=now)


# Replicas, weight, wanted number: what is done.
CASES: dict[str, tuple[list[Replica], int, int, Step]] = {
    "one canary comes beside everything that serves": (
        [old(0), old(1), old(2)], 10, 3, Step(create=(Creation(0, "new"),)),
    ),
    "nobody goes while the canary starts": ([*map(old, range(10)), new(0, S.STARTING)], 10, 10,
        Step(),
    ),
    "one of ten goes for a canary that serves a tenth": (
        [*map(old, range(10)), new(0)], 10, 10, Step(drain=(old(9),)),
    ),
    "none of two goes for a canary that serves a tenth": (
        [old(0), old(1), new(0)], 10, 2, Step(),
    ),
    "half and half is reached one at a time": (
        [*map(old, range(4))], 50, 4, Step(create=(Creation(0, "new"),)),
    ),
    "a lost proven replica is replaced before there is a canary": (
        [old(0), old(1, S.LOST)], 10, 2,
        Step(create=(Creation(2, "old"), Creation(0, "new")), remove=(old(1, S.LOST),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replicas", "weight", "desired", "expected"), CASES.values(), ids=CASES)
def test_split_step(replicas: list[Replica], weight: int, desired: int, expected: Step) -> None:
    assert step(replicas, canary(weight, desired), desired) == expected


def test_a_paused_rollout_keeps_what_it_has_and_fills_up_with_what_is_proven() -> None:
    there = [old(0), old(1), new(0)]
    split = paused_split(there, "new", "old", desired=4)
    assert (split.new, split.old) == (1, 3)
    assert step(there, split, 4).create == (Creation(2, "old"),)


def test_a_paused_rollout_shrinks_with_the_deployment() -> None:
    there = [old(0), old(1), new(0)]
    split = paused_split(there, "new", "old", desired=1)
    assert step(there, split, 1).drain == (old(1), old(0))


@given(st.integers(1, 99), st.integers(1, 200))
def test_no_replica_of_a_canary_split_has_more_than_an_even_share(
    weight: int, desired: int
) -> None:
    split = canary(weight, desired)
    assert desired <= split.new + split.old <= desired + 1
    assert weight / split.new <= 100 / desired + 1e-9
    assert (100 - weight) / split.old <= 100 / desired + 1e-9


worlds = st.lists(
    st.builds(
        Replica,
        slot=st.integers(0, 5),
        revision=st.sampled_from(["older", "old", "new"]),
        standing=st.sampled_from(list(Standing)),
    ),
    max_size=9,
    unique_by=lambda replica: replica.place,
)


@given(worlds, st.integers(1, 99), st.integers(1, 5))
@settings(max_examples=300)
def test_every_split_is_reached_and_then_nothing_is_done(
    replicas: list[Replica], weight: int, desired: int
) -> None:
    split, now = canary(weight, desired), NOW
    lowest = serving = sum(r.standing is S.IN_SERVICE for r in replicas)
    for _ in range(60):
        now += timedelta(seconds=400)
        todo = step(replicas, split, desired, now)
        replicas = _live(replicas, todo)
        lowest = min(lowest, sum(r.standing is S.IN_SERVICE for r in replicas))
    there = [(r.revision, r.standing) for r in replicas]
    assert there.count(("new", S.IN_SERVICE)) == split.new
    assert there.count(("old", S.IN_SERVICE)) == split.old
    assert len(there) == split.new + split.old
    assert step(replicas, split, desired, now) == Step()
    assert lowest >= min(serving, desired)


def _live(replicas: list[Replica], todo: Step) -> list[Replica]:
    """Return the replicas one stage further."""
    lived = [r for r in map(_older, replicas) if r is not None and r not in todo.remove]
    lived = [replace(r, standing=S.DRAINING) if r in todo.drain else r for r in lived]
    return lived + [Replica(c.slot, c.revision, S.STARTING) for c in todo.create]


def _older(replica: Replica) -> Replica | None:
    match replica.standing:
        case S.LEAVING:
            return None
        case S.DRAINING:
            return replace(replica, standing=S.LEAVING)
        case S.STARTING | S.UNREADY:
            return replace(replica, standing=S.IN_SERVICE)
    return replica
