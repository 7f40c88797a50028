"""The arbiter beside a job's reconcile, on an API server in memory: start, give back, queue."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mizzen.operator.controllers import finetunejob
from mizzen.operator.controllers.capacity import Arbiter
from mizzen.operator.controllers.capacity_observe import read_leases, read_nodes
from mizzen.operator.desired import labels
from mizzen.operator.engine.key import Key
from mizzen.operator.ledger import Ledger
from tests.fixtures.serving_world import World

GPU = "example.com/gpu"
JOBS = "/apis/mizzen.dev/v1alpha1/namespaces/team/finetunejobs"
PODS = "/api/v1/namespaces/team/pods"
KEY = Key("finetunejob", "team", "tune")
NOW = datetime(2026, 9, 1, 12, 10, tzinfo=UTC)
GROUP_GATES = [{"name": labels.CAPACITY_GATE}, {"name": labels.GROUP_GATE}]


class Cluster:
    """One node of two devices, one job that borrows one, and the arbiter."""

    def __init__(self) -> None:
        self.world = World()
        self.api = self.world.api
        self.now = NOW
        object.__setattr__(self.world.facts, "ledger", Ledger(sees_nodes=None))
        self.facts = self.world.facts
        self.changed: list[Key] = []
        self.arbiter = Arbiter(
            kube=self.world.kube, facts=self.facts, on_change=self.changed.append
        )
        self.api.put(
            "/api/v1/nodes/a",
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": "a", "labels": {labels.HOSTNAME: "host-a"}},
                "spec": {},
                "status": {
                    "allocatable": {GPU: "2", "cpu": "4"},
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            },
        )
        self.api.put(
            "/api/v1/namespaces/team/persistentvolumeclaims/models",
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "models", "namespace": "team"},
            },
        )

    def submit(self, *, workers: int = 1, **spare: Any) -> None:
        self.api.put(
            f"{JOBS}/tune",
            {
                "apiVersion": "mizzen.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": "tune", "namespace": "team", "generation": 1,
                             "creationTimestamp": "2026-09-01T12:00:00Z"},
                "spec": {
                    "baseModel": {"source": "pvc://models/smollm2"},
                    "dataset": [{"name": "d", "uri": "pvc://models/data.jsonl"}],
                    "resources": {"accelerator": {"resource": GPU}},
                    "workers": {"max": workers},
                    "spareCapacity": {"enabled": True, "yieldWithinSeconds": 30} | spare,
                },
            },
        )  # fmt: skip

    def replica(
        self, name: str, *, is_gated: bool = False, node: str = "", rank: int = 0, **more: Any
    ) -> None:
        spec: dict[str, Any] = {"containers": [{"resources": {"limits": {GPU: "1"}}}], **more}
        if is_gated:
            spec.setdefault("schedulingGates", [{"name": labels.CAPACITY_GATE}])
        if node:
            spec["nodeName"] = node
        own = {labels.ROLE: labels.ROLE_RUNTIME, labels.DEPLOYMENT: "chat", labels.RANK: str(rank),
               labels.REVISION: "r", labels.SLOT: name.partition("-")[0]}  # fmt: skip
        self.api.put(
            f"{PODS}/{name}",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "namespace": "team", "labels": own,
                             "creationTimestamp": "2026-09-01T12:00:00Z"},
                "spec": spec,
                "status": {"phase": "Pending"},
            },
        )  # fmt: skip

    async def look(self) -> dict[str, Any]:
        """Reconcile, decide, reconcile; return the job's status."""
        await finetunejob.reconcile(KEY, kube=self.world.kube, facts=self.facts, now=self.now)
        await self.arbiter.look(now=self.now)
        await finetunejob.reconcile(KEY, kube=self.world.kube, facts=self.facts, now=self.now)
        return self.api.objects[f"{JOBS}/tune"]["status"]

    def pod(self, name: str) -> dict[str, Any] | None:
        return self.api.objects.get(f"{PODS}/{name}")

    def run(self, name: str) -> None:
        pod = self.pod(name)
        assert pod is not None
        status = {"phase": "Running", "podIP": ""}
        self.api.put(f"{PODS}/{name}", pod | {"status": status})

    def leave(self, name: str, *, at: str) -> None:
        """Have the trainer commit a checkpoint and exit."""
        pod = self.pod(name)
        assert pod is not None
        words = {"phase": "Running", "checkpoint": {"step": 7, "committedAt": at}}
        ended = {"exitCode": 75, "finishedAt": at, "message": json.dumps(words)}
        container = {"name": "trainer", "state": {"terminated": ended}}
        status = {"phase": "Failed", "containerStatuses": [container]}
        self.api.put(f"{PODS}/{name}", pod | {"status": status})

    def is_gated(self, name: str) -> bool:
        pod = self.pod(name)
        assert pod is not None
        return bool(pod["spec"].get("schedulingGates"))

    def restart_operator(self) -> None:
        """Begin anew with what the API server knows."""
        self.world.restart_operator()
        object.__setattr__(self.world.facts, "ledger", Ledger(sees_nodes=None))
        self.facts = self.world.facts
        self.arbiter = Arbiter(kube=self.world.kube, facts=self.facts, on_change=lambda key: None)


def trainer_pod() -> dict[str, Any]:
    own = {labels.ROLE: labels.ROLE_TRAINER, labels.JOB: "tune"}
    return {
        "metadata": {"namespace": "team", "labels": own,
                     "creationTimestamp": "2026-09-01T12:00:00Z"},
        "spec": {"nodeName": "a", "containers": [{"resources": {"limits": {GPU: "1"}}}]},
    }  # fmt: skip


def admitted(status: dict[str, Any]) -> tuple[str, str]:
    found = next(c for c in status["conditions"] if c["type"] == "Admitted")
    return found["status"], found["reason"]


async def test_a_job_starts_on_the_node_it_was_given() -> None:
    cluster = Cluster()
    cluster.submit()
    await cluster.look()
    pod = cluster.pod("tune-g1-0")
    assert pod is not None
    assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_job_waits_where_nothing_is_spare_and_says_so() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.replica("two", node="a")
    cluster.submit()
    status = await cluster.look()
    assert cluster.pod("tune-g1-0") is None
    assert status["phase"] == "Pending"
    assert admitted(status) == ("False", "NoSpareCapacity")


async def test_a_replica_is_let_in_once_the_job_has_left_and_the_job_waits() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("two", is_gated=True)
    status = await cluster.look()
    assert status["phase"] == "Yielding"
    assert admitted(status) == ("False", "Yielded")
    assert status["lending"]["preemptions"] == 1
    waiting = cluster.pod("two")
    assert waiting is not None and waiting["spec"]["schedulingGates"]
    assert labels.WAITS_SINCE in waiting["metadata"]["annotations"]
    assert Key("llmdeployment", "team", "chat") in cluster.changed

    # It does not leave in time, so its pod is ended where it is.
    cluster.now += timedelta(seconds=31)
    status = await cluster.look()
    assert status["lending"]["slowestYieldSeconds"] == 31.0
    cluster.api.objects.pop(f"{PODS}/tune-g1-0", None)
    cluster.world.restart_operator()
    object.__setattr__(cluster.world.facts, "ledger", cluster.facts.ledger)
    cluster.facts = cluster.world.facts
    cluster.arbiter = Arbiter(
        kube=cluster.world.kube, facts=cluster.facts, on_change=lambda key: None
    )
    status = await cluster.look()
    let_in = cluster.pod("two")
    assert let_in is not None and not let_in["spec"].get("schedulingGates")
    assert let_in["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}
    assert admitted(status) == ("False", "YieldTooSlow")


async def test_a_gate_is_opened_when_no_job_is_left() -> None:
    cluster = Cluster()
    cluster.replica("two", is_gated=True)
    await cluster.arbiter.look(now=NOW)
    pod = cluster.pod("two")
    assert pod is not None and not pod["spec"].get("schedulingGates")


async def test_without_a_right_to_see_nodes_only_jobs_that_keep_their_devices_start() -> None:
    cluster = Cluster()
    object.__setattr__(cluster.facts, "ledger", Ledger(sees_nodes=False))
    cluster.submit()
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    assert admitted(cluster.api.objects[f"{JOBS}/tune"]["status"]) == ("False", "NodesUnknown")
    cluster.submit(enabled=False)
    cluster.facts.specs.forget(cluster.api.objects[f"{JOBS}/tune"])
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    assert cluster.pod("tune-g1-0") is not None


async def test_a_job_that_left_in_time_goes_on_when_the_replica_is_gone() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("two", is_gated=True)
    await cluster.look()
    cluster.leave("tune-g1-0", at="2026-09-01T12:10:04Z")
    cluster.now += timedelta(seconds=5)
    status = await cluster.look()
    assert not cluster.is_gated("two")
    assert status["lending"]["slowestYieldSeconds"] == 4.0
    assert admitted(status) == ("False", "Yielded")
    assert status["checkpoint"]["step"] == 7

    cluster.api.drop(f"{PODS}/two")
    cluster.restart_operator()
    cluster.now += timedelta(seconds=30)
    status = await cluster.look()
    again = cluster.pod("tune-g2-0")
    assert again is not None
    assert again["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}
    assert again["metadata"]["annotations"][labels.PREEMPTIONS] == "1"


async def test_a_job_does_not_start_on_devices_that_a_look_gives_away_meanwhile() -> None:
    cluster = Cluster()
    cluster.replica("one", node="a")
    cluster.submit()
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    await cluster.arbiter.look(now=NOW)
    ledger = cluster.facts.ledger
    assert KEY in ledger.admitted
    has_answer = asyncio.Event()
    cluster.api.fault = lambda method, path: has_answer.set()
    async with ledger.handing_out:
        looking = asyncio.create_task(cluster.arbiter.look(now=NOW))
        starting = asyncio.create_task(
            finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
        )
        await has_answer.wait()  # its first write, its pod's ConfigMap, comes of the old answer
        cluster.replica("two", is_gated=True)
    await asyncio.gather(looking, starting)
    assert not cluster.is_gated("two")
    assert cluster.pod("tune-g1-0") is None
    status = cluster.api.objects[f"{JOBS}/tune"]["status"]
    assert status["phase"] == "Pending"
    assert admitted(status) == ("False", "NoSpareCapacity")


async def test_a_gang_half_made_by_an_operator_that_died_needs_only_the_rest() -> None:
    cluster = Cluster()
    cluster.submit(workers=2)

    def die(method: str, path: str) -> None:
        if method == "POST" and path == PODS and cluster.pod("tune-g1-0"):
            raise ConnectionError

    cluster.api.fault = die
    await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    await cluster.arbiter.look(now=NOW)
    with pytest.raises(ConnectionError):
        await finetunejob.reconcile(KEY, kube=cluster.world.kube, facts=cluster.facts, now=NOW)
    cluster.api.fault = lambda method, path: None
    cluster.restart_operator()
    await cluster.look()
    for name in ("tune-g1-0", "tune-g1-1"):
        pod = cluster.pod(name)
        assert pod is not None
        assert pod["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_generation_made_smaller_keeps_the_places_it_has() -> None:
    cluster = Cluster()
    cluster.submit(workers=2)
    await cluster.look()
    placed = cluster.pod("tune-g1-1")
    assert placed is not None
    cluster.api.put(f"{PODS}/tune-g1-1", placed | {"spec": placed["spec"] | {"nodeName": "a"}})
    cluster.now += timedelta(minutes=5)
    await cluster.look()
    alone = cluster.pod("tune-g2-0")
    assert alone is not None and cluster.pod("tune-g2-1") is None
    assert alone["spec"]["nodeSelector"] == {labels.HOSTNAME: "host-a"}


async def test_a_replica_of_two_pods_is_let_in_whole_and_only_when_all_are_there() -> None:
    cluster = Cluster()
    cluster.submit()  # so that there is somebody to share with
    await cluster.look()
    cluster.run("tune-g1-0")
    cluster.replica("big-0", is_gated=True, schedulingGates=GROUP_GATES)
    await cluster.look()
    assert cluster.is_gated("big-0")
    assert cluster.pod("tune-g1-0")["metadata"]["annotations"].get(labels.RECLAIMED_AT) is None

    cluster.api.drop(f"{PODS}/big-0")
    cluster.replica("big-0", is_gated=True)
    cluster.replica("big-1", is_gated=True, rank=1)
    await cluster.look()
    assert cluster.is_gated("big-0") and cluster.is_gated("big-1"), "one alone had room"
    cluster.leave("tune-g1-0", at="2026-09-01T12:10:04Z")
    await cluster.look()
    assert not cluster.is_gated("big-0") and not cluster.is_gated("big-1")


async def test_a_replica_that_its_user_pinned_to_a_node_is_let_in_there() -> None:
    cluster = Cluster()
    cluster.submit()
    cluster.replica("two", is_gated=True, nodeSelector={labels.HOSTNAME: "host-a"})
    await cluster.look()
    assert not cluster.is_gated("two")


async def test_a_replica_goes_where_its_selector_and_tolerations_let_it() -> None:
    cluster = Cluster()
    spare = {"key": "dedicated", "value": "chat", "effect": "NoSchedule"}
    for name, more in (("b", {"pool": "h100"}), ("c", {"pool": "l4"})):
        node = json.loads(json.dumps(cluster.api.objects["/api/v1/nodes/a"]))
        node["metadata"] = {"name": name, "labels": {labels.HOSTNAME: f"host-{name}", **more}}
        node["spec"] = {"taints": [spare]} if name == "b" else {}
        cluster.api.put(f"/api/v1/nodes/{name}", node)
    cluster.submit()
    selector = {"pool": "h100"}
    cluster.replica("one", is_gated=True, nodeSelector=selector, tolerations=[spare])
    cluster.replica("two", is_gated=True, nodeSelector=selector)
    await cluster.look()
    bound = cluster.pod("one")
    assert bound is not None and not cluster.is_gated("one")
    assert bound["spec"]["nodeSelector"] == {**selector, labels.HOSTNAME: "host-b"}
    missing = cluster.pod("two")
    assert missing is not None and not cluster.is_gated("two"), "the scheduler says what is missing"
    assert missing["spec"]["nodeSelector"] == selector


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


def test_pods_that_kueue_admits_are_no_lease_of_ours() -> None:
    cluster = Cluster()
    nodes = read_nodes([cluster.api.objects["/api/v1/nodes/a"]])
    pod = trainer_pod()
    jobs: dict[str, Any] = {"team/tune": {}}
    assert [lease.job for lease in read_leases([pod], jobs, nodes, GPU, now=NOW)] == ["team/tune"]
    pod["metadata"]["labels"][labels.KUEUE_QUEUE] = "research"
    assert read_leases([pod], jobs, nodes, GPU, now=NOW) == []
