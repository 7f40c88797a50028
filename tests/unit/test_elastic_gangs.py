"""Jobs that do with fewer pods: what they start with, when they grow, how they shrink."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from mizzen.operator.planning.lending import Hold, QueuedJob, lend
from mizzen.operator.planning.placement import Gang
from mizzen.operator.planning.preemption import Lease
from tests.fixtures.one_node import LONG_AGO, NOW, cluster
from tests.fixtures.shared_cluster import PODS, Cluster


def lease(job: str, devices: int) -> Lease:
    return Lease(job=job, devices={"a": devices}, started_at=LONG_AGO, is_reclaimable=True)


def gang(name: str, pods: int, least: int | None, step: int = 1, **more: object) -> QueuedJob:
    """Return a job of so many pods of one device each, that does with the least of them."""
    document = {"namespace": "team", "since": NOW, "is_spare": True, "yield_within_s": 30}
    sizes = {"gang": Gang(pods, 1), "least_pods": least, "pods_step": step}
    return QueuedJob(job=name, **(document | sizes | more))  # type: ignore[arg-type]


ROOMS = {
    "as many as find room": (3, gang("tune", 4, 1), 3),
    "no more than it can use": (4, gang("tune", 2, 1), 2),
    "whole copies alone": (3, gang("tune", 4, 2, 2), 2),
    "the fewest it does with": (2, gang("tune", 4, 2), 2),
    "none where not even those find room": (1, gang("tune", 4, 2), 0),
    "none where all of them have to": (3, gang("tune", 4, None), 0),
}


@pytest.mark.parametrize(("free", "asks", "pods"), ROOMS.values(), ids=ROOMS)
def test_a_job_starts_with(free: int, asks: QueuedJob, pods: int) -> None:
    decision = lend(cluster(free=free, queue=(asks,)), now=NOW)
    assert len(decision.admit.get("tune", ())) == pods
    assert ("tune" in decision.waits) == (pods == 0)


def test_a_job_that_lacks_room_says_how_little_it_would_do_with() -> None:
    decision = lend(cluster(free=1, queue=(gang("tune", 4, 2),)), now=NOW)
    assert "asks for at least 2 times 1 example.com/gpu" in decision.waits["tune"].message


def test_others_leave_for_the_fewest_pods_of_a_job_and_not_for_all() -> None:
    leases = (lease("one", 2), lease("two", 2))
    asks = gang("kept", 4, 2, is_spare=False)
    decision = lend(cluster(leases=leases, queue=(asks,)), now=NOW)
    assert decision.reclaim == {"one": "kept"}


def test_a_job_is_too_large_only_where_its_fewest_pods_would_not_fit_on_empty_nodes() -> None:
    asked = (gang("fits", 9, 4), gang("never", 9, 5))
    decision = lend(cluster(queue=asked), now=NOW)
    assert {name: wait.hold for name, wait in decision.waits.items()} == {
        "fits": Hold.NO_ROOM,
        "never": Hold.TOO_LARGE,
    }


def test_a_job_that_runs_is_offered_what_nobody_waits_for() -> None:
    more = gang("tune", 3, 1, is_running=True)
    assert lend(cluster(free=2, queue=(more,)), now=NOW).admit == {"tune": ("a", "a")}
    assert lend(cluster(free=2, reserve=(Gang(1, 1),), queue=(more,)), now=NOW).admit == {
        "tune": ("a",)
    }
    for waits in (gang("large", 3, None), gang("small", 1, None)):
        admit = lend(cluster(free=2, queue=(more, waits)), now=NOW).admit
        assert ("tune" in admit) == (waits.job == "small"), "who waits goes before who has some"


def test_nobody_leaves_so_that_a_job_that_runs_may_grow() -> None:
    more = gang("kept", 3, 1, is_running=True, is_spare=False)
    decision = lend(cluster(leases=(lease("tune", 4),), queue=(more,)), now=NOW)
    assert (decision.admit, decision.reclaim, decision.waits) == ({}, {}, {})


def test_no_more_is_offered_to_a_job_that_left_too_slowly() -> None:
    more = gang("slow", 3, 1, is_running=True, slowest_yield_s=31.0)
    assert lend(cluster(free=2, queue=(more,)), now=NOW).admit == {}


def test_a_job_that_was_to_shrink_keeps_its_fewest_pods_from_others_until_it_starts_anew() -> None:
    shrunk = gang("shrunk", 4, 1, preemptions=1)
    decision = lend(cluster(free=2, queue=(shrunk, gang("eager", 2, None))), now=NOW)
    assert decision.waits["shrunk"].hold is Hold.SETTLING
    assert decision.waits["eager"].hold is Hold.NO_ROOM
    decision = lend(cluster(free=2, queue=(shrunk, gang("eager", 1, None))), now=NOW)
    assert list(decision.admit) == ["eager"]


async def test_a_job_that_does_with_fewer_pods_starts_with_those_and_grows_after_a_while() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit(workers=2)
    status = await cluster.look()
    assert (status["workers"], cluster.pod("tune-g1-1")) == (1, None)
    cluster.run("tune-g1-0")
    cluster.api.drop(f"{PODS}/one")
    cluster.now += timedelta(minutes=4)
    await cluster.look()
    assert cluster.pod("tune-g1-0") is not None, "so short a run is not ended for more room"
    cluster.now += timedelta(minutes=2)
    assert (await cluster.look())["phase"] == "Yielding"
    cluster.leave("tune-g1-0", at="2026-09-01T12:16:02Z")
    status = await cluster.look()
    assert (status["workers"], status["lending"]["preemptions"]) == (2, 0)
    assert cluster.pod("tune-g2-0") and cluster.pod("tune-g2-1")


async def test_a_job_shrinks_where_a_replica_needs_but_one_of_its_devices() -> None:
    cluster = Cluster()
    cluster.submit(workers=2)
    await cluster.look()
    for rank in (0, 1):
        cluster.run(f"tune-g1-{rank}")
    cluster.replica("one", is_gated=True)
    assert (await cluster.look())["phase"] == "Yielding"
    for rank in (0, 1):
        cluster.leave(f"tune-g1-{rank}", at="2026-09-01T12:10:10Z")
    await cluster.look()
    assert not cluster.is_gated("one")
    cluster.now += timedelta(minutes=1)
    status = await cluster.look()
    assert (status["workers"], status["lending"]["preemptions"]) == (1, 1)
    assert cluster.pod("tune-g2-0") and not cluster.pod("tune-g2-1")


async def test_what_an_operator_wrote_before_it_died_is_written_anew_for_other_devices() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit(workers=2)

    def die(method: str, path: str) -> None:
        if method == "POST" and path == PODS:
            raise ConnectionError

    cluster.api.fault = die
    with pytest.raises(ConnectionError):
        await cluster.look()
    assert workers_in_job_json(cluster) == 1
    cluster.api.fault = lambda method, path: None
    cluster.api.drop(f"{PODS}/one")
    cluster.restart_operator()
    await cluster.look()
    assert workers_in_job_json(cluster) == 2
    assert cluster.pod("tune-g1-0") and cluster.pod("tune-g1-1")


def workers_in_job_json(cluster: Cluster) -> int:
    config_map = cluster.api.objects["/api/v1/namespaces/team/configmaps/tune-g1"]
    return int(json.loads(config_map["data"]["job.json"])["workers"])
