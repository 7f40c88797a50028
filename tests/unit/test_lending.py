"""Who gets the devices: what each rule is for."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from mizzen.operator.planning.lending import (
    Hold,
    QueuedJob,
    Want,
    lend,
    reserved_blocks,
)
from mizzen.operator.planning.placement import Gang, freed, place
from mizzen.operator.planning.preemption import MIN_RUN, Lease
from tests.fixtures.one_node import LONG_AGO, NOW, cluster


def want(name: str = "chat", *, devices: int = 1, is_gated: bool = True) -> Want:
    return Want(name=name, gang=Gang(1, devices), is_gated=is_gated, since=NOW)


def lease(job: str, devices: int = 1, **more: object) -> Lease:
    document = {"started_at": LONG_AGO, "is_reclaimable": True, "devices": {"a": devices}}
    return Lease(job=job, **(document | more))  # type: ignore[arg-type]


def job(name: str, devices: int = 1, **more: object) -> QueuedJob:
    document = {"namespace": "team", "since": NOW, "is_spare": True, "yield_within_s": 30}
    return QueuedJob(job=name, gang=Gang(1, devices), **(document | more))  # type: ignore[arg-type]


def test_a_replica_that_finds_room_is_let_in_and_nobody_leaves() -> None:
    decision = lend(cluster(free=1, wants=(want(),), leases=(lease("tune"),)), now=NOW)
    assert decision.let_in == {"chat": ("a",)}
    assert decision.reclaim == {}


def test_a_replica_without_room_takes_back_the_cheapest_lease_and_waits_for_it() -> None:
    leases = (lease("large", 2), lease("far", unsaved_s=500.0), lease("near", unsaved_s=5.0))
    decision = lend(cluster(wants=(want(),), leases=leases), now=NOW)
    assert decision.reclaim == {"near": "chat"}
    assert decision.let_in == {}


def test_small_jobs_leave_before_a_large_one_that_would_lose_more_and_not_otherwise() -> None:
    large = lease("large", 4)
    small = (lease("one"), lease("two"))
    snapshot = cluster(
        capacity={"a": 4, "b": 2},
        held={"a": 4, "b": 2},
        wants=(want(devices=2),),
        leases=(large, *(replace(job, devices={"b": 1}) for job in small)),
    )
    assert lend(snapshot, now=NOW).reclaim == {"one": "chat", "two": "chat"}
    long_unsaved = (replace(job, devices={"b": 1}, unsaved_s=200.0) for job in small)
    dearer = replace(snapshot, leases=(large, *long_unsaved))
    assert lend(dearer, now=NOW).reclaim == {"large": "chat"}


def test_nobody_is_asked_twice_while_a_job_is_on_its_way_out() -> None:
    leases = (lease("leaving", is_leaving=True), lease("stays"))
    decision = lend(cluster(wants=(want(),), leases=leases), now=NOW)
    assert decision.reclaim == {}
    assert decision.let_in == {}


def test_nobody_leaves_where_that_would_not_help_and_the_scheduler_says_why() -> None:
    decision = lend(cluster(wants=(want(devices=3),), leases=(lease("tune"),)), now=NOW)
    assert decision.reclaim == {}
    assert decision.let_in == {"chat": ()}


def test_a_job_that_keeps_its_devices_is_never_asked_to_leave() -> None:
    kept = lease("kept", is_reclaimable=False)
    assert lend(cluster(wants=(want(),), leases=(kept,)), now=NOW).reclaim == {}


def test_devices_that_come_back_are_kept_for_the_replica_they_were_taken_for() -> None:
    leases = (lease("leaving", 2, is_leaving=True),)
    snapshot = cluster(free=1, wants=(want(devices=3),), leases=leases, queue=(job("eager"),))
    decision = lend(snapshot, now=NOW)
    assert decision.admit == {}
    assert decision.waits["eager"].hold is Hold.NO_ROOM


def test_the_reserve_is_not_lent() -> None:
    snapshot = cluster(free=3, reserve=(Gang(1, 2),), queue=(job("one"), job("two")))
    decision = lend(snapshot, now=NOW)
    assert list(decision.admit) == ["one"]
    assert "no node can spare that now" in decision.waits["two"].message


@pytest.mark.parametrize(("there", "blocks"), [(0, 2), (2, 2), (3, 1), (4, 0), (5, 0)])
def test_nothing_is_reserved_beyond_the_replicas_a_deployment_may_have(
    there: int, blocks: int
) -> None:
    gang = Gang(1, 2)
    assert reserved_blocks(gang, reserve=2, most=4, there=there) == (gang,) * blocks


def test_a_guaranteed_job_goes_before_and_takes_from_one_that_lends() -> None:
    guaranteed = job("paid", is_spare=False)
    decision = lend(cluster(leases=(lease("tune"),), queue=(job("late"), guaranteed)), now=NOW)
    assert decision.reclaim == {"tune": "paid"}
    assert decision.waits["paid"].hold is Hold.COMING


def test_a_job_is_not_stopped_for_another_one_in_its_first_minutes() -> None:
    young = lease("young", started_at=NOW - MIN_RUN + timedelta(seconds=1))
    guaranteed = job("paid", is_spare=False)
    decision = lend(cluster(leases=(young,), queue=(guaranteed,)), now=NOW)
    assert decision.reclaim == {}
    assert lend(cluster(leases=(young,), wants=(want(),)), now=NOW).reclaim == {"young": "chat"}


def test_a_job_with_higher_priority_takes_from_a_lower_one_and_not_from_its_like() -> None:
    leases = (lease("low"), lease("like", priority=5))
    decision = lend(cluster(leases=leases, queue=(job("high", priority=5),)), now=NOW)
    assert decision.reclaim == {"low": "high"}


def test_hours_of_waiting_lift_a_job_over_a_higher_priority() -> None:
    old = job("old", since=NOW - timedelta(hours=5))
    decision = lend(cluster(free=1, queue=(job("new", priority=1), old)), now=NOW)
    assert list(decision.admit) == ["old"]


def test_the_namespace_that_had_least_goes_first() -> None:
    queue = (job("a", namespace="greedy"), job("b", namespace="modest"))
    decision = lend(cluster(free=1, queue=queue, used_s={"greedy": 1000.0}), now=NOW)
    assert list(decision.admit) == ["b"]


def test_many_jobs_of_one_namespace_do_not_all_go_before_another_one_s() -> None:
    queue = (*(job(f"a{n}", namespace="many") for n in range(5)), job("b", namespace="one"))
    assert set(lend(cluster(free=2, queue=queue), now=NOW).admit) == {"a0", "b"}


def test_small_jobs_do_not_overtake_a_large_one_for_ever() -> None:
    large = job("large", 4, since=NOW - timedelta(hours=3))
    decision = lend(cluster(free=1, queue=(large, job("small"))), now=NOW)
    assert decision.admit == {}
    assert decision.waits["small"].hold is Hold.BEHIND


def test_a_job_that_waits_for_other_nodes_is_in_nobodys_way() -> None:
    def on(name: str, nodes: set[str], **more: object) -> QueuedJob:
        gang = Gang(1, 4 if name == "large" else 1, frozenset(nodes))
        return replace(job(name, **more), gang=gang)

    large = on("large", {"a"}, since=NOW - timedelta(hours=3))
    queue = (large, on("apart", {"b"}), on("beside", {"a", "b"}))
    snapshot = cluster(capacity={"a": 4, "b": 4}, held={"a": 1, "b": 0}, queue=queue)
    decision = lend(snapshot, now=NOW)
    assert list(decision.admit) == ["apart"]
    assert decision.waits["beside"].hold is Hold.BEHIND


def test_nobody_is_asked_to_leave_while_others_are_giving_enough_devices_back() -> None:
    snapshot = cluster(wants=(want(),), leases=(lease("tune"),), returning={"a": 1})
    decision = lend(snapshot, now=NOW)
    assert (decision.reclaim, decision.let_in) == ({}, {})
    larger = cluster(wants=(want(devices=2),), leases=(lease("tune"),), returning={"a": 1})
    assert lend(larger, now=NOW).reclaim == {"tune": "chat"}


def test_jobs_that_lend_may_run_while_a_large_guaranteed_one_waits() -> None:
    large = job("large", 4, since=NOW - timedelta(hours=3), is_spare=False)
    decision = lend(cluster(free=1, queue=(large, job("small"))), now=NOW)
    assert list(decision.admit) == ["small"]


@pytest.mark.parametrize(
    ("slowest_s", "is_admitted"), [(None, True), (29.0, True), (30.0, True), (31.0, False)]
)
def test_a_job_that_left_too_slowly_gets_no_spare_capacity(
    slowest_s: float | None, is_admitted: bool
) -> None:
    decision = lend(cluster(free=1, queue=(job("tune", slowest_yield_s=slowest_s),)), now=NOW)
    assert ("tune" in decision.admit) is is_admitted
    if not is_admitted:
        assert "Raise spec.spareCapacity.yieldWithinSeconds" in decision.waits["tune"].message


def test_a_job_that_no_empty_node_could_hold_is_told_so() -> None:
    wait = lend(cluster(free=4, queue=(job("huge", 8),)), now=NOW).waits["huge"]
    assert wait.hold is Hold.TOO_LARGE
    assert "Lower spec.resources.accelerator.count, add nodes, or let it run on" in wait.message


def test_a_job_that_just_left_waits_for_the_wave_to_pass() -> None:
    def admitted(seconds: int) -> bool:
        back = job("tune", preemptions=1, since=NOW - timedelta(seconds=seconds))
        return "tune" in lend(cluster(free=1, queue=(back,)), now=NOW).admit

    assert not admitted(29)
    assert admitted(30)


def test_the_fullest_node_that_has_room_is_taken() -> None:
    assert place(Gang(1, 1), {"a": 4, "b": 1, "c": 2}) == ("b",)
    assert place(Gang(2, 2), {"a": 4, "b": 1, "c": 2}) == ("c", "a")
    assert place(Gang(2, 3), {"a": 4, "b": 1, "c": 2}) is None


def test_what_comes_back_on_a_cordoned_node_is_no_room() -> None:
    assert freed({"a": 1}, [{"a": 1, "cordoned": 4}]) == {"a": 2}
