"""Devices that replicas had of late: lent to jobs that give them back, and to no others."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from mizzen.operator.controllers.capacity_kept import replicas_of_late
from mizzen.operator.planning.lending import Hold, QueuedJob, lend, surge_blocks
from mizzen.operator.planning.placement import Gang
from mizzen.operator.planning.preemption import Lease
from mizzen.operator.status.conditions import rfc3339
from tests.fixtures.one_node import LONG_AGO, NOW, cluster
from tests.fixtures.shared_cluster import GPU, Cluster, admitted
from tests.fixtures.shared_cluster import NOW as TODAY

DEPLOYMENT = "/apis/mizzen.dev/v1alpha1/namespaces/team/llmdeployments/smollm2"


def job(name: str, devices: int = 1, *, keeps: bool, **more: Any) -> QueuedJob:
    document = {"namespace": "team", "since": NOW, "yield_within_s": 30, "is_spare": not keeps}
    return QueuedJob(job=name, gang=Gang(1, devices), **(document | more))


def lease(name: str, devices: int = 1) -> Lease:
    return Lease(job=name, devices={"a": devices}, started_at=LONG_AGO, is_reclaimable=True)


def test_a_job_that_lends_gets_what_one_that_keeps_its_devices_does_not() -> None:
    queue = (job("keeps", 2, keeps=True), job("lends", 2, keeps=False))
    decision = lend(cluster(free=3, surge=(Gang(1, 2),), queue=queue), now=NOW)
    assert list(decision.admit) == ["lends"]
    wait = decision.waits["keeps"]
    assert wait.hold is Hold.KEPT
    assert "Set spec.spareCapacity.enabled to true, or lower scaling.max" in wait.message


def test_beside_what_is_kept_a_job_starts() -> None:
    queue = (job("keeps", 1, keeps=True),)
    assert list(lend(cluster(free=3, surge=(Gang(1, 2),), queue=queue), now=NOW).admit) == ["keeps"]


def test_a_job_waits_for_room_where_it_would_not_be_kept_from_it() -> None:
    queue = (job("keeps", 4, keeps=True),)
    decision = lend(cluster(free=3, surge=(Gang(1, 2),), queue=queue), now=NOW)
    assert decision.waits["keeps"].hold is Hold.NO_ROOM


def test_what_is_lent_is_not_taken_over_by_a_job_that_keeps_it() -> None:
    queue = (job("keeps", keeps=True),)
    lent = cluster(leases=(lease("one"), lease("two")), surge=(Gang(1, 2),), queue=queue)
    decision = lend(lent, now=NOW)
    assert decision.reclaim == {}
    assert decision.waits["keeps"].hold is Hold.KEPT
    # Beyond what replicas had, a borrower goes for it.
    decision = lend(replace(lent, surge=(Gang(1, 1),)), now=NOW)
    assert list(decision.reclaim.values()) == ["keeps"]


def test_devices_are_kept_on_the_nodes_where_the_replicas_may_run() -> None:
    surge = (Gang(1, 2, frozenset({"b"})),)
    nodes = {"capacity": {"a": 2, "b": 2}, "held": {"a": 0, "b": 0}, "surge": surge}
    queue = tuple(job(f"keeps-{n}", 2, keeps=True) for n in range(2))
    decision = lend(cluster(queue=queue, **nodes), now=NOW)
    assert decision.admit == {"keeps-0": ("a",)}
    assert decision.waits["keeps-1"].hold is Hold.KEPT


def test_a_job_of_many_sizes_takes_what_is_not_kept() -> None:
    some = job("starts", keeps=True, least_pods=1)
    more = job("grows", keeps=True, least_pods=1, is_running=True)
    for one in (some, more):
        queue = (replace(one, gang=Gang(4, 1)),)
        decision = lend(cluster(free=4, surge=(Gang(1, 3),), queue=queue), now=NOW)
        assert decision.admit == {one.job: ("a",)}


@pytest.mark.parametrize(
    ("of_late", "there", "reserve", "blocks"),
    [(3, 1, 0, 2), (3, 1, 1, 1), (3, 1, 5, 0), (3, 3, 0, 0), (2, 4, 0, 0)],
)
def test_the_reserve_is_part_of_what_replicas_had(
    of_late: int, there: int, reserve: int, blocks: int
) -> None:
    gang = Gang(1, 2)
    assert surge_blocks(gang, of_late=of_late, reserve=reserve, there=there) == (gang,) * blocks


def move(minutes: int, before: int, after: int) -> dict[str, Any]:
    return {"time": rfc3339(NOW - timedelta(minutes=minutes)), "before": before, "after": after}


@pytest.mark.parametrize(
    ("scaling", "most"),
    [
        (None, 0),
        ({"desired": 2}, 2),
        ({"desired": 1, "history": [move(5, 2, 1), move(50, 4, 2), move(61, 9, 4)]}, 4),
        ({"desired": 0, "history": [move(61, 4, 0)]}, 0),
    ],
)
def test_the_most_of_an_hour_is_read_from_the_autoscalers_moves(
    scaling: dict[str, Any] | None, most: int
) -> None:
    assert replicas_of_late({"scaling": scaling} if scaling else {}, now=NOW) == most


async def test_a_job_waits_until_the_deployment_has_been_small_for_an_hour() -> None:
    cluster = Cluster()
    cluster.world.change(scaling={"min": 0, "max": 2}, accelerator={"resource": GPU, "count": 1})
    document = cluster.api.objects[DEPLOYMENT]
    fell = {"time": rfc3339(TODAY - timedelta(minutes=30)), "before": 2, "after": 0}
    scaling = {"desired": 0, "history": [fell]}
    cluster.api.put(DEPLOYMENT, document | {"status": {"scaling": scaling}})
    cluster.submit(enabled=False)
    status = await cluster.look()
    assert admitted(status) == ("False", "KeptForReplicas")
    cluster.now = TODAY + timedelta(minutes=29)
    assert admitted(await cluster.look()) == ("False", "KeptForReplicas")
    cluster.now = TODAY + timedelta(minutes=31)
    await cluster.look()
    assert cluster.pod("tune-g1-0") is not None
