"""The rollout as a table of sentences, and as properties of whole walks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.operator.planning.rollout import (
    Budget,
    Creation,
    Replica,
    Standing,
    Step,
    next_step,
    retry_wait_s,
)

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
LONG_AGO = NOW - timedelta(hours=1)
SURGE = Budget(surge=1, unavailable=0)
NO_SURGE = Budget(surge=0, unavailable=1)

S = Standing


def make(slot: int, replaces: Replica | None = None) -> Creation:
    return Creation(slot, "new", replaces)


def old(slot: int, standing: Standing = S.IN_SERVICE) -> Replica:
    return Replica(slot, "old", standing)


def new(slot: int, standing: Standing = S.IN_SERVICE, **more: object) -> Replica:
    return replace(Replica(slot, "new", standing), **more)  # type: ignore[arg-type]


FAILED_LONG_AGO = new(0, S.FAILED, restarts=2, failed_at=LONG_AGO)
FAILED_JUST_NOW = new(0, S.FAILED, restarts=2, failed_at=NOW)

CASES: dict[str, tuple[list[Replica], int, Budget, Step]] = {
    "creates every replica at once at the start": (
        [], 2, SURGE, Step(create=(make(0), make(1))),
    ),
    "does nothing when all wanted replicas serve": ([new(0), new(1)], 2, SURGE, Step()),
    "waits for a replica that is starting": ([new(0), new(1, S.STARTING)], 2, SURGE, Step()),
    "takes the lowest free slot": ([new(1)], 2, SURGE, Step(create=(make(0),))),
    "does not reuse the name of a replica that is still leaving": (
        [new(0, S.LEAVING)], 1, SURGE, Step(create=(make(1),)),
    ),
    "replaces a lost replica at once, under another name": (
        [new(0, S.LOST)], 1, SURGE, Step(create=(make(1),), remove=(new(0, S.LOST),)),
    ),
    "surges by one while every old replica serves": (
        [old(0), old(1), old(2)], 3, SURGE, Step(create=(make(0),)),
    ),
    "waits until the new replica serves": (
        [old(0), old(1), old(2), new(0, S.STARTING)], 3, SURGE, Step(),
    ),
    "drains one old replica, the highest slot, for each new one that serves": (
        [old(0), old(1), old(2), new(0)], 3, SURGE, Step(drain=(old(2),)),
    ),
    "counts a draining old replica, because it still holds its devices": (
        [old(0), old(1), old(2, S.DRAINING), new(0)], 3, SURGE, Step(),
    ),
    "goes on when the drained one has been deleted": (
        [old(0), old(1), old(2, S.LEAVING), new(0)], 3, SURGE, Step(create=(make(1),)),
    ),
    "removes an old replica that never served, without waiting": (
        [old(0), old(1, S.STARTING), new(0, S.STARTING)], 2, SURGE,
        Step(create=(make(1),), remove=(old(1, S.STARTING),)),
    ),
    "drains an old replica that became unready, since it may have requests": (
        [old(0), old(1, S.UNREADY), new(0, S.STARTING)], 2, SURGE, Step(drain=(old(1, S.UNREADY),)),
    ),
    "drains first where no surge is allowed": (
        [old(0), old(1)], 2, NO_SURGE, Step(drain=(old(1),)),
    ),
    "creates into the gap where no surge is allowed": (
        [old(0), old(1, S.LEAVING)], 2, NO_SURGE, Step(create=(make(0),)),
    ),
    "surges by one even where the budget allows nothing": (
        [old(0)], 1, Budget(surge=0, unavailable=0), Step(create=(make(0),)),
    ),
    "scales down the replica that never served first": (
        [new(0, S.STARTING), new(1)], 1, SURGE, Step(remove=(new(0, S.STARTING),)),
    ),
    "scales down the highest slot among equals": (
        [new(0), new(1), new(2)], 1, SURGE, Step(drain=(new(2), new(1))),
    ),
    "scales to nothing by draining": ([new(0)], 0, SURGE, Step(drain=(new(0),))),
    "drains old replicas too when nothing is wanted": (
        [old(0), new(0, S.STARTING)], 0, SURGE,
        Step(drain=(old(0),), remove=(new(0, S.STARTING),)),
    ),
    "a failed replica waits for its back-off": (
        [FAILED_JUST_NOW], 1, SURGE, Step(look_again_after_s=40.0),
    ),
    "a failed replica is replaced after its back-off, and the failures are counted": (
        [FAILED_LONG_AGO], 1, SURGE,
        Step(create=(make(1, FAILED_LONG_AGO),), remove=(FAILED_LONG_AGO,)),
    ),
    "old replicas keep serving while the new one fails": (
        [old(0), FAILED_JUST_NOW], 1, SURGE, Step(look_again_after_s=40.0),
    ),
    "a failed replica that is not wanted any more goes at once": (
        [new(1), FAILED_JUST_NOW], 1, SURGE, Step(remove=(FAILED_JUST_NOW,)),
    ),
    "a failed old replica goes at once": (
        [old(0, S.FAILED)], 1, SURGE,
        Step(create=(make(0),), remove=(old(0, S.FAILED),)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replicas", "desired", "budget", "expected"), CASES.values(), ids=CASES)
def test_next_step(replicas: list[Replica], desired: int, budget: Budget, expected: Step) -> None:
    assert next_step(replicas, revision="new", desired=desired, budget=budget, now=NOW) == expected


def test_back_off_doubles_up_to_five_minutes() -> None:
    assert [retry_wait_s(n) for n in range(7)] == [10, 20, 40, 80, 160, 300, 300]


standings = st.sampled_from(list(Standing))
replicas_of = st.builds(
    Replica,
    slot=st.integers(0, 5),
    revision=st.sampled_from(["old", "older", "new"]),
    standing=standings,
    restarts=st.integers(0, 8),
    failed_at=st.sampled_from([None, LONG_AGO, NOW]),
)
worlds = st.lists(replicas_of, max_size=9, unique_by=lambda r: (r.revision, r.slot))
budgets = st.builds(Budget, surge=st.integers(0, 3), unavailable=st.integers(0, 3))
sizes = st.integers(0, 5)


def plan(replicas: list[Replica], desired: int, budget: Budget, now: datetime = NOW) -> Step:
    return next_step(replicas, revision="new", desired=desired, budget=budget, now=now)


def in_service(replicas: list[Replica]) -> int:
    return sum(replica.standing is S.IN_SERVICE for replica in replicas)


@given(worlds, sizes, budgets, st.randoms())
def test_the_order_of_children_does_not_matter(
    replicas: list[Replica], desired: int, budget: Budget, random: object
) -> None:
    shuffled = list(replicas)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, desired, budget) == plan(replicas, desired, budget)


@given(worlds, sizes, budgets)
def test_no_step_takes_more_out_of_service_than_the_promise_allows(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    step = plan(replicas, desired, budget)
    taken = sum(replica.standing is S.IN_SERVICE for replica in (*step.drain, *step.remove))
    promise = min(in_service(replicas), desired - budget.unavailable)
    assert in_service(replicas) - taken >= promise


@given(worlds, sizes, budgets)
def test_nothing_that_may_have_requests_is_removed_without_a_drain(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    step = plan(replicas, desired, budget)
    assert all(replica.standing in (S.UNREADY, S.IN_SERVICE) for replica in step.drain)
    assert all(replica.standing in (S.LOST, S.FAILED, S.STARTING) for replica in step.remove)


@given(worlds, sizes, budgets)
def test_a_new_replica_never_takes_a_name_in_use(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    step = plan(replicas, desired, budget)
    slots = [creation.slot for creation in step.create]
    assert len(set(slots)) == len(slots)
    assert not {r.slot for r in replicas if r.revision == "new"} & set(slots)


@given(worlds, sizes, budgets)
def test_creating_stays_within_the_surge(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    step = plan(replicas, desired, budget)
    gone = {*step.remove}
    held = [
        r for r in replicas
        if r not in gone and r.standing in (S.FAILED, S.STARTING, S.UNREADY, S.IN_SERVICE)
    ]  # fmt: skip
    if step.create:
        assert len(held) + len(step.create) <= desired + max(1, budget.surge)


@dataclass
class World:
    """A cluster in which plans come true, one tick at a time."""

    replicas: list[Replica]
    breaks_revision: str = ""  # its replicas always fail
    now: datetime = NOW
    lowest_in_service: int = 99

    def apply(self, step: Step) -> None:
        states = {(r.revision, r.slot): r for r in self.replicas}
        for replica in step.drain:
            states[replica.revision, replica.slot] = replace(replica, standing=S.DRAINING)
        for replica in step.remove:
            states[replica.revision, replica.slot] = replace(replica, standing=S.LEAVING)
        for creation in step.create:
            states["new", creation.slot] = Replica(
                creation.slot, "new", S.STARTING, restarts=creation.restarts
            )
        self.replicas = list(states.values())
        self.lowest_in_service = min(self.lowest_in_service, in_service(self.replicas))

    def live(self) -> None:
        """Let what was begun come one stage further."""
        self.now += timedelta(seconds=400)
        self.replicas = [r for r in map(self._next, self.replicas) if r is not None]

    def _next(self, replica: Replica) -> Replica | None:
        match replica.standing:
            case S.LEAVING:
                return None
            case S.DRAINING:
                return replace(replica, standing=S.LEAVING)
            case S.STARTING if replica.revision == self.breaks_revision:
                return replace(replica, standing=S.FAILED, failed_at=self.now)
            case S.STARTING | S.UNREADY:
                return replace(replica, standing=S.IN_SERVICE)
        return replica


def settle(world: World, desired: int, budget: Budget, *, ticks: int = 60) -> None:
    for _ in range(ticks):
        world.apply(plan(world.replicas, desired, budget, world.now))
        world.live()


@given(worlds, sizes, budgets)
@settings(max_examples=300)
def test_every_rollout_ends_with_exactly_the_wanted_replicas_and_an_empty_plan(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    world = World(replicas)
    settle(world, desired, budget)
    assert [r.standing for r in world.replicas] == [S.IN_SERVICE] * desired
    assert {r.revision for r in world.replicas} <= {"new"}
    assert plan(world.replicas, desired, budget, world.now) == Step()


@given(sizes, sizes, budgets)
def test_in_service_replicas_never_fall_below_the_promise_during_a_rollout(
    before: int, desired: int, budget: Budget
) -> None:
    world = World([old(slot) for slot in range(before)])
    settle(world, desired, budget)
    assert world.lowest_in_service >= min(before, desired - budget.unavailable)


@given(st.integers(1, 5), budgets)
def test_a_rollout_to_a_broken_revision_leaves_what_was_promised_serving(
    desired: int, budget: Budget
) -> None:
    world = World([old(slot) for slot in range(desired)], breaks_revision="new")
    settle(world, desired, budget)
    assert in_service(world.replicas) >= desired - budget.unavailable
    assert len(world.replicas) <= desired + max(1, budget.surge) + 1
