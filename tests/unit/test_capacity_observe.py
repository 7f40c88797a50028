"""What the arbiter reads from nodes and pods."""

from __future__ import annotations

from typing import Any

import pytest

from mizzen.operator.controllers.capacity_observe import (
    read_held,
    read_leases,
    read_nodes,
    read_replicas,
    read_returning,
)
from mizzen.operator.desired import labels
from tests.fixtures.shared_cluster import GPU, NOW, Cluster


def trainer_pod() -> dict[str, Any]:
    own = {labels.ROLE: labels.ROLE_TRAINER, labels.JOB: "tune"}
    return {
        "metadata": {"namespace": "team", "labels": own,
                     "creationTimestamp": "2026-09-01T12:00:00Z"},
        "spec": {"nodeName": "a", "containers": [{"resources": {"limits": {GPU: "1"}}}]},
    }  # fmt: skip


COMING_BACK = {
    "a pod that is to be gone in a minute": ("2026-09-01T12:11:00Z", {}, {"a": 1}),
    "one that is late by seconds": ("2026-09-01T12:09:30Z", {}, {"a": 1}),
    "not one that is stuck": ("2026-09-01T12:08:00Z", {}, {}),
    "not one that may take an hour": ("2026-09-01T13:10:00Z", {}, {}),
    "not one that stays": (None, {}, {}),
    "not a job's, which are its lease": ("2026-09-01T12:11:00Z", {"team/tune": {}}, {}),
}


@pytest.mark.parametrize(("gone_by", "jobs", "expected"), COMING_BACK.values(), ids=COMING_BACK)
def test_devices_that_are_coming_back_are_those_of(
    gone_by: str | None, jobs: dict[str, Any], expected: dict[str, int]
) -> None:
    nodes = read_nodes([Cluster().api.objects["/api/v1/nodes/a"]])
    pod = trainer_pod()
    if gone_by:
        pod["metadata"]["deletionTimestamp"] = gone_by
    assert read_returning([pod], jobs, nodes, GPU, now=NOW) == expected


@pytest.mark.parametrize(
    ("committed_at", "unsaved_s"),
    [
        ("2026-09-01T12:09:00Z", 60.0),
        ("2026-09-01T12:09:00", 600.0),
        ("soon", 600.0),
        (None, 600.0),
    ],
)
def test_a_checkpoint_of_unknown_time_counts_as_none(
    committed_at: str | None, unsaved_s: float
) -> None:
    pod = trainer_pod()
    jobs: dict[str, Any] = {"team/tune": {"status": {"checkpoint": {"committedAt": committed_at}}}}
    (lease,) = read_leases([pod], jobs, {}, GPU, now=NOW)
    assert lease.unsaved_s == unsaved_s


@pytest.mark.parametrize("rank", [{}, {labels.RANK: "first"}])
def test_a_strangers_pod_that_looks_like_half_a_replica_stops_nothing(rank: dict[str, str]) -> None:
    pod = trainer_pod()
    pod["metadata"]["labels"] = {labels.ROLE: labels.ROLE_RUNTIME} | rank
    del pod["spec"]["nodeName"]
    (replica,) = read_replicas([pod, pod], {}, GPU)
    assert not replica.want.is_gated


def test_pods_that_kueue_admits_are_no_lease_of_ours() -> None:
    cluster = Cluster()
    nodes = read_nodes([cluster.api.objects["/api/v1/nodes/a"]])
    pod = trainer_pod()
    jobs: dict[str, Any] = {"team/tune": {}}
    assert [lease.job for lease in read_leases([pod], jobs, nodes, GPU, now=NOW)] == ["team/tune"]
    pod["metadata"]["labels"][labels.KUEUE_QUEUE] = "research"
    assert read_leases([pod], jobs, nodes, GPU, now=NOW) == []


def asks(*devices: int, resource: str = GPU, **more: Any) -> list[dict[str, Any]]:
    return [{"resources": {"limits": {resource: str(count)}}} | more for count in devices]


def foreign_pod(phase: str = "Running", **spec: Any) -> dict[str, Any]:
    """A pod that has nothing of ours about it."""
    return {
        "metadata": {"namespace": "strangers", "name": "notebook",
                     "creationTimestamp": "2026-09-01T12:00:00Z"},
        "spec": {"nodeName": "a", "containers": asks(1)} | spec,
        "status": {"phase": phase},
    }  # fmt: skip


HELD = {
    "a pod that runs": (foreign_pod(), {"a": 1}),
    "one that is bound and does not run yet": (foreign_pod("Pending"), {"a": 1}),
    "not one that succeeded": (foreign_pod("Succeeded"), {}),
    "not one that failed": (foreign_pod("Failed"), {}),
    "one whose node does not answer": (foreign_pod("Unknown"), {"a": 1}),
    "not one that no node was found for": (foreign_pod("Pending", nodeName=None), {}),
    "one that waits for its node by name": (
        foreign_pod("Pending", nodeName=None, nodeSelector={labels.HOSTNAME: "host-b"}),
        {"b": 1},
    ),
    "a pod on another node": (foreign_pod(nodeName="b"), {"b": 1}),
    "all containers together": (foreign_pod(containers=asks(1, 2)), {"a": 3}),
    "the largest init container where that asks for more": (
        foreign_pod(initContainers=asks(1, 4), containers=asks(2)),
        {"a": 4},
    ),
    "the containers where those ask for more": (
        foreign_pod(initContainers=asks(1, 1), containers=asks(2)),
        {"a": 2},
    ),
    "sidecars beside the containers": (
        foreign_pod(initContainers=asks(1, 2, restartPolicy="Always"), containers=asks(2)),
        {"a": 5},
    ),
    "sidecars beside the init containers that start after them": (
        foreign_pod(
            initContainers=[*asks(1, restartPolicy="Always"), *asks(4)], containers=asks(2)
        ),
        {"a": 5},
    ),
    "not sidecars beside the init containers before them": (
        foreign_pod(
            initContainers=[*asks(4), *asks(1, restartPolicy="Always")], containers=asks(2)
        ),
        {"a": 4},
    ),
    "what is requested where no limit is named": (
        foreign_pod(containers=[{"resources": {"requests": {GPU: "2"}}}]),
        {"a": 2},
    ),
    "nothing of another resource": (
        foreign_pod(containers=[*asks(3, resource="example.com/other"), {}]),
        {"a": 0},
    ),
}


@pytest.mark.parametrize(("pod", "expected"), HELD.values(), ids=HELD)
def test_devices_that_a_stranger_holds_are_those_of(
    pod: dict[str, Any], expected: dict[str, int]
) -> None:
    cluster = Cluster()
    cluster.node("b")
    nodes = read_nodes([cluster.api.objects[f"/api/v1/nodes/{name}"] for name in "ab"])
    assert read_held([pod], nodes, GPU) == expected
    assert read_leases([pod], {"strangers/notebook": {}}, nodes, GPU, now=NOW) == []
