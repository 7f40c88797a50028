"""The arbiter beside a job's reconcile, on an API server in memory: start, give back, queue."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from mizzen.operator.controllers import finetunejob
from mizzen.operator.controllers.capacity import Arbiter
from mizzen.operator.desired import labels
from mizzen.operator.engine.key import Key
from mizzen.operator.ledger import Ledger
from tests.fixtures.serving_world import World

GPU = "example.com/gpu"
JOBS = "/apis/mizzen.dev/v1alpha1/namespaces/team/finetunejobs"
PODS = "/api/v1/namespaces/team/pods"
KEY = Key("finetunejob", "team", "tune")
NOW = datetime(2026, 9, 1, 12, 10, tzinfo=UTC)


class Cluster:
    """One node of two devices, one job that borrows one, and the arbiter."""

    def __init__(self) -> None:
        self.world = World()
        self.api = self.world.api
        self.now = NOW
        object.__setattr__(self.world.facts, "ledger", Ledger(sees_nodes=None))
        self.facts = self.world.facts
        self.arbiter = Arbiter(kube=self.world.kube, facts=self.facts, on_change=lambda key: None)
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

    def submit(self, **spare: Any) -> None:
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
                    "spareCapacity": {"enabled": True, "yieldWithinSeconds": 30} | spare,
                },
            },
        )  # fmt: skip

    def replica(self, name: str, *, is_gated: bool = False, node: str = "") -> None:
        spec: dict[str, Any] = {"containers": [{"resources": {"limits": {GPU: "1"}}}]}
        if is_gated:
            spec["schedulingGates"] = [{"name": labels.CAPACITY_GATE}]
        if node:
            spec["nodeName"] = node
        own = {labels.ROLE: labels.ROLE_RUNTIME, labels.DEPLOYMENT: "chat", labels.RANK: "0",
               labels.REVISION: "r", labels.SLOT: name}  # fmt: skip
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
