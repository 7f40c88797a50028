"""Who gets the devices: what must hold for every cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.operator.planning.lending import (
    Decision,
    QueuedJob,
    Snapshot,
    Want,
    lend,
)
from mizzen.operator.planning.placement import Gang, freed, place
from mizzen.operator.planning.preemption import Lease, choose_victims
from tests.fixtures.one_node import NOW

NODES = ("a", "b", "c")

gangs = st.builds(
    Gang,
    pods=st.integers(1, 3),
    devices=st.integers(1, 4),
    nodes=st.none() | st.frozensets(st.sampled_from(NODES), min_size=1),
)
elastic = st.sampled_from(
    [{}, {"least_pods": 1}, {"least_pods": 1, "is_running": True}]  # the last one has some already
)
moments = st.integers(0, 400).map(lambda minutes: NOW - timedelta(minutes=minutes))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Return clusters in which every pod that has a node fits on it."""
    capacity = {node: draw(st.integers(0, 8)) for node in NODES}
    left = dict(capacity)
    leases = []
    for number in range(draw(st.integers(0, 4))):
        nodes = place(draw(gangs), left)
        if nodes is None:
            continue
        devices = {node: 1 for node in nodes if left[node]}
        for node in devices:
            left[node] -= 1
        leases.append(
            Lease(
                job=f"lease-{number}",
                devices=devices,
                started_at=draw(moments),
                is_reclaimable=draw(st.booleans()),
                is_leaving=draw(st.booleans()),
                priority=draw(st.integers(-1, 1)),
                unsaved_s=draw(st.floats(0, 1000)),
            )
        )
    others = {node: draw(st.integers(0, room)) for node, room in left.items()}
    held = freed(others, (lease.devices for lease in leases))
    returning = {node: draw(st.integers(0, count)) for node, count in others.items()}
    wants = tuple(
        Want(name=f"want-{n}", gang=draw(gangs), is_gated=draw(st.booleans()), since=draw(moments))
        for n in range(draw(st.integers(0, 3)))
    )
    queue = tuple(
        QueuedJob(
            job=f"job-{n}",
            namespace=draw(st.sampled_from(["red", "blue"])),
            gang=draw(gangs),
            since=draw(moments),
            is_spare=draw(st.booleans()),
            priority=draw(st.integers(-1, 1)),
            preemptions=draw(st.integers(0, 2)),
            **draw(elastic),
        )
        for n in range(draw(st.integers(0, 4)))
    )
    return Snapshot(
        resource="example.com/gpu",
        capacity=capacity,
        held=held,
        returning=returning,
        leases=tuple(leases),
        wants=wants,
        reserve=tuple(draw(st.lists(gangs, max_size=2))),
        surge=tuple(draw(st.lists(gangs, max_size=2))),
        queue=queue,
    )


def free_of(snapshot: Snapshot) -> dict[str, int]:
    return {node: room - snapshot.held[node] for node, room in snapshot.capacity.items()}


def spare_of(snapshot: Snapshot) -> dict[str, int]:
    """Return the devices that are free, come back or can be asked back."""
    back = [one.devices for one in snapshot.leases if one.is_reclaimable or one.is_leaving]
    return freed(free_of(snapshot), [*back, snapshot.returning])


def given_out(snapshot: Snapshot, decision: Decision) -> Counter[str]:
    """Return the devices that the decision hands out now, by node."""
    gangs = {want.name: want.gang for want in snapshot.wants}
    gangs |= {job.job: job.gang for job in snapshot.queue}
    count: Counter[str] = Counter()
    for name, nodes in [*decision.let_in.items(), *decision.admit.items()]:
        for node in nodes:
            count[node] += gangs[name].devices
    return count


def less(free: Mapping[str, int], taken: Mapping[str, int]) -> dict[str, int]:
    return {node: room - taken.get(node, 0) for node, room in free.items()}


def placeable(gangs: Iterable[Gang], free: Mapping[str, int]) -> int:
    left, count = dict(free), 0
    for gang in gangs:
        nodes = place(gang, left)
        count += nodes is not None
        for node in nodes or ():
            left[node] -= gang.devices
    return count


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_no_node_is_promised_more_devices_than_are_free(snapshot: Snapshot) -> None:
    left = less(free_of(snapshot), given_out(snapshot, lend(snapshot, now=NOW)))
    assert all(room >= 0 for room in left.values())


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_a_gang_is_placed_whole_and_where_it_may_go(snapshot: Snapshot) -> None:
    decision = lend(snapshot, now=NOW)
    for job in snapshot.queue:
        nodes = decision.admit.get(job.job)
        if not job.is_running:
            assert (nodes is None) == (job.job in decision.waits)
        if nodes is not None:
            assert job.least.pods <= len(nodes) <= job.gang.pods
            assert job.gang.nodes is None or set(nodes) <= job.gang.nodes


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_admitted_jobs_leave_the_reserve_as_large_as_it_was(snapshot: Snapshot) -> None:
    decision = lend(snapshot, now=NOW)
    for_replicas = given_out(
        snapshot,
        Decision(let_in=decision.let_in, reclaim={}, admit={}, waits={}),
    )
    before = less(free_of(snapshot), for_replicas)
    after = less(free_of(snapshot), given_out(snapshot, decision))
    # With what is coming back a reserve may be met later, so only what could be met now counts.
    is_quiet = not any(lease.is_leaving for lease in snapshot.leases) and not decision.reclaim
    if is_quiet and not any(snapshot.returning.values()):
        first = snapshot.reserve[:1]
        assert placeable(first, after) == placeable(first, before)


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_jobs_that_keep_their_devices_leave_room_for_the_replicas_of_late(
    drawn: Snapshot,
) -> None:
    snapshot = replace(drawn, wants=(), reserve=(), surge=drawn.surge[:1])
    decision = lend(snapshot, now=NOW)
    before = spare_of(snapshot)
    taken: Counter[str] = Counter()
    for one in snapshot.queue:
        for node in () if one.is_spare else decision.admit.get(one.job, ()):
            taken[node] += one.gang.devices
    assert placeable(snapshot.surge, less(before, taken)) == placeable(snapshot.surge, before)


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_nobody_leaves_for_a_job_that_would_not_get_the_devices(
    drawn: Snapshot,
) -> None:
    snapshot = replace(drawn, wants=(), reserve=(), surge=drawn.surge[:1])
    decision = lend(snapshot, now=NOW)
    keeping = {one.job: one for one in snapshot.queue if not one.is_spare}
    left = spare_of(snapshot)
    for gang in snapshot.surge:
        for node in place(gang, left) or ():
            left[node] -= gang.devices
    for who in decision.reclaim.values():
        if who in keeping:
            assert place(keeping[who].least, left) is not None


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_only_those_who_lend_are_asked_to_leave_and_each_for_somebody(snapshot: Snapshot) -> None:
    decision = lend(snapshot, now=NOW)
    leases = {lease.job: lease for lease in snapshot.leases}
    waiting = {want.name for want in snapshot.wants} | set(decision.waits)
    for job, who in decision.reclaim.items():
        assert leases[job].is_reclaimable
        assert not leases[job].is_leaving
        assert who in waiting
        assert who not in decision.let_in


@given(snapshots(), gangs)
@settings(max_examples=80, deadline=None)
def test_no_victim_can_be_spared_and_together_they_make_room(
    snapshot: Snapshot, gang: Gang
) -> None:
    free = free_of(snapshot)
    victims = choose_victims(gang, free, snapshot.leases)
    if victims is None:
        everybody = [x.devices for x in snapshot.leases if x.is_reclaimable and not x.is_leaving]
        assert place(gang, freed(free, everybody)) is None
        return
    assert place(gang, freed(free, [victim.devices for victim in victims])) is not None
    if place(gang, free) is None:
        for spared in victims:
            rest = [victim.devices for victim in victims if victim is not spared]
            assert place(gang, freed(free, rest)) is None


@given(snapshots())
@settings(max_examples=80, deadline=None)
def test_the_order_in_which_things_are_listed_changes_nothing(snapshot: Snapshot) -> None:
    turned = Snapshot(
        resource=snapshot.resource,
        capacity=dict(reversed(snapshot.capacity.items())),
        held=snapshot.held,
        returning=snapshot.returning,
        leases=snapshot.leases[::-1],
        wants=snapshot.wants[::-1],
        reserve=snapshot.reserve,
        surge=snapshot.surge,
        queue=snapshot.queue[::-1],
    )
    assert lend(turned, now=NOW) == lend(snapshot, now=NOW)
