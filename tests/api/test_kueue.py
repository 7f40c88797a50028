"""A job in one of Kueue's queues on a real API server: what Kueue does to pods is played here.

`make kueue` has a real one do it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.cluster.api_only import ApiCluster
from mizzen.operator.desired import labels
from tests.fixtures.job_scene import Document, Scene, condition, job

pytestmark = pytest.mark.api

CRDS = str(Path(__file__).parent.parent / "fixtures" / "kueue_crds.yaml")
FINALIZER = "kueue.x-k8s.io/managed"
NO_QUOTA = "couldn't assign flavors: insufficient unused quota for nvidia.com/gpu"
QUEUE: Document = {
    "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "LocalQueue",
    "metadata": {"name": "research"}, "spec": {"clusterQueue": "all"},
}  # fmt: skip


@pytest.fixture
def kueue(cluster: ApiCluster) -> Iterator[None]:
    """Kueue's kinds, without a Kueue."""
    cluster.kubectl("apply", "--server-side", "-f", CRDS)
    cluster.kubectl("wait", "--for=condition=Established", "-f", CRDS, "--timeout=300s")
    yield
    cluster.kubectl("delete", "-f", CRDS)


@pytest.fixture
def queue(kueue: None, scene: Scene) -> None:
    scene.apply(QUEUE)


def take(scene: Scene, *pods: str) -> None:
    """Do to new pods what Kueue's webhook does."""
    for pod in pods:
        metadata = {"labels": {labels.KUEUE_MANAGED: "true"}, "finalizers": [FINALIZER]}
        scene.kubectl("patch", "pod", pod, "--type=merge", "-p", json.dumps({"metadata": metadata}))


def admit(scene: Scene, *pods: str) -> None:
    """Lift the gate and have a kubelet run the pods."""
    for pod in pods:
        gone = [{"op": "remove", "path": "/spec/schedulingGates"}]
        scene.kubectl("patch", "pod", pod, "--type=json", "-p", json.dumps(gone))
        scene.play(pod, "Running")


def preempt(scene: Scene, pod: str) -> None:
    """Take the quota back as Kueue does: say so on the pod, then delete it."""
    found = json.loads(scene.kubectl("get", "pod", pod, "-o", "json"))
    stopped = {"type": "TerminationTarget", "status": "True", "reason": "WorkloadEvicted",
               "message": "Preempted", "lastTransitionTime": "2026-01-01T00:00:00Z"}  # fmt: skip
    conditions = [*found["status"].get("conditions", []), stopped]
    scene.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge",
                  "-p", json.dumps({"status": {"conditions": conditions}}))  # fmt: skip
    scene.kubectl("delete", "pod", pod, "--wait=false")


def let_go(scene: Scene, *pods: str) -> None:
    for pod in pods:
        gone = json.dumps({"metadata": {"finalizers": None}})
        scene.kubectl("patch", "pod", pod, "--type=merge", "-p", gone)


async def test_a_queue_without_kueue_is_refused_before_there_are_pods(scene: Scene) -> None:
    scene.apply(job(queue="research"))
    status = await scene.look()
    ready = condition(status, "Ready")
    assert ready["reason"] == "KueueNotInstalled"
    assert "spec.queue names research" in ready["message"]
    assert scene.pods() == []


async def test_a_queue_that_is_missing_is_named_and_waited_for(kueue: None, scene: Scene) -> None:
    scene.apply(job(queue="research"))
    status = await scene.look()
    ready = condition(status, "Ready")
    assert ready["reason"] == "QueueNotFound"
    assert "no LocalQueue of that name" in ready["message"]
    assert scene.pods() == []
    scene.apply(QUEUE)
    await scene.look()
    assert scene.pods() == ["support-g1-0"]


async def test_pods_that_kueue_has_not_taken_over_run_nowhere_and_say_so(
    queue: None, scene: Scene
) -> None:
    scene.apply(job(queue="research"))
    status = await scene.look(times=2)
    assert condition(status, "Ready")["reason"] == "NotTakenByKueue"
    gates = scene.kubectl("get", "pod", "support-g1-0", "-o", "jsonpath={.spec.schedulingGates}")
    assert json.loads(gates) == [{"name": labels.KUEUE_GATE}]


async def test_a_job_says_what_it_waits_for_and_is_admitted(queue: None, scene: Scene) -> None:
    scene.apply(job(queue="research", workers={"max": 2}))
    await scene.look()
    take(scene, "support-g1-0", "support-g1-1")
    status = await scene.look()
    told = condition(status, "Admitted")
    assert (told["status"], told["reason"]) == ("False", "WaitsInQueue")
    assert told["message"] == "The job waits in queue research: Kueue has not looked at it yet."
    assert status["phase"] == "Pending"
    # What `kubectl get` prints beside it.
    assert condition(status, "Ready")["message"] == told["message"]

    refusal = {"type": "QuotaReserved", "status": "False", "message": NO_QUOTA}
    scene.apply({
        "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload",
        "metadata": {"name": "support-g1"}, "status": {"conditions": [refusal]},
    })  # fmt: skip
    told = condition(await scene.look(), "Admitted")
    assert told["message"] == f"The job waits in queue research: {NO_QUOTA}"

    admit(scene, "support-g1-0", "support-g1-1")
    assert condition(await scene.look(), "Admitted")["status"] == "True"
    let_go(scene, "support-g1-0", "support-g1-1")


async def test_a_preempted_job_goes_on_as_another_group(queue: None, scene: Scene) -> None:
    scene.apply(job(queue="research"))
    await scene.look()
    take(scene, "support-g1-0")
    admit(scene, "support-g1-0")
    await scene.look()
    preempt(scene, "support-g1-0")
    status = await scene.look()
    assert (status["phase"], condition(status, "Admitted")["reason"]) == ("Yielding", "Yielded")
    words = {"phase": "Running", "checkpoint": {"step": 7, "committedAt": "now"}}
    scene.play("support-g1-0", "Failed", exitCode=75, message=json.dumps(words))
    status = await scene.look()
    assert status["checkpoint"]["step"] == 7
    assert status["lending"]["preemptions"] == 1
    # Also while Kueue still holds the old pod by its finalizer.
    assert scene.pods() == ["support-g1-0", "support-g2-0"]
    group = f"{labels.KUEUE_GROUP}=support-g2"
    assert scene.kubectl("get", "pods", "-l", group, "-o", "name") == "pod/support-g2-0\n"
    let_go(scene, "support-g1-0")


async def test_a_trainer_that_kueue_had_to_kill_counts_as_no_crash(
    queue: None, scene: Scene
) -> None:
    scene.apply(job(queue="research"))
    await scene.look()
    take(scene, "support-g1-0")
    admit(scene, "support-g1-0")
    await scene.look()
    preempt(scene, "support-g1-0")
    scene.play("support-g1-0", "Failed", exitCode=137)
    status = await scene.look()
    assert scene.pods() == ["support-g1-0", "support-g2-0"]
    assert status["restarts"] == 0
    let_go(scene, "support-g1-0")


async def test_all_pods_of_a_job_that_is_suspended_in_its_queue_leave_at_once(
    queue: None, scene: Scene
) -> None:
    scene.apply(job(queue="research", workers={"max": 2}))
    await scene.look()
    take(scene, "support-g1-0", "support-g1-1")
    await scene.look()
    let_go(scene, "support-g1-0", "support-g1-1")
    scene.apply(job(queue="research", workers={"max": 2}, suspend=True))
    await scene.look()
    assert scene.pods() == []
    assert (await scene.look())["phase"] == "Suspended"
