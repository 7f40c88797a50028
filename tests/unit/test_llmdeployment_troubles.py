"""What Ready says of a deployment that cannot serve, and that a corrected spec recovers."""

from __future__ import annotations

from typing import Any

import pytest

from mizzen.operator.engine.results import Retryable
from mizzen.operator.kube.errors import QuotaExceeded
from tests.fixtures.memory_api import failing
from tests.fixtures.serving_world import PODS, World, names

GPU = {"resource": "nvidia.com/gpu"}


LAST_WORDS = '{"reason": "ModelNotFound", "message": "No model there."}'


LAST_END = {"exitCode": 42, "message": LAST_WORDS}


TROUBLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an image that cannot be pulled": (
        {"containerStatuses": [{"name": "runtime", "image": "registry/nope:1", "ready": False,
                                "state": {"waiting": {"reason": "ImagePullBackOff"}}}]},
        "ImagePullFailed",
        "The image registry/nope:1 cannot be pulled. Correct its name or tag, or name the "
        "registry's credentials in spec.podTemplatePatch.imagePullSecrets.",
    ),
    "a model that does not exist, in the runtime's own words": (
        {"phase": "Running",
         "containerStatuses": [{"name": "runtime", "ready": False,
                                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                                "lastState": {"terminated": LAST_END}}]},
        "ModelNotFound", "No model there.",
    ),
    "a claim that does not exist": (
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                         "message": '0/3 nodes are available: persistentvolumeclaim "models" not '
                                    "found. no new claims to deallocate, preemption: 0/3 nodes"}]},
        "ClaimNotFound",
        "There is no PersistentVolumeClaim models in namespace team. Create it, or correct the "
        "pvc:// address in the spec.",
    ),
    "no room, without counts that change": (
        {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                         "message": "0/3 nodes are available: 1 node(s) had untolerated taint "
                                    "{gpu: true}, 2 Insufficient cpu. preemption: 0/3 nodes are "
                                    "available: 3 No preemption victims found."}]},
        "Unschedulable",
        "No node has room for the pod: Insufficient cpu, node(s) had untolerated taint "
        "{gpu: true}.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pod_status", "reason", "message"), TROUBLES.values(), ids=TROUBLES)
async def test_ready_names_the_cause_and_a_corrected_spec_recovers(
    pod_status: dict[str, Any], reason: str, message: str
) -> None:
    world = World()
    await world.look()
    (name,) = names(world)
    world.set_status(name, stuck=True, **pod_status)
    await world.look()
    assert world.condition("Ready") == ("False", reason, message)
    assert world.condition("Degraded") == ("True", reason, message)
    version = world.resource["metadata"]["resourceVersion"]
    for _ in range(5):
        world.pass_time(60)
        await world.look()
    assert names(world) == [name], "the pod stays"
    assert world.resource["metadata"]["resourceVersion"] == version, "nothing flaps"
    world.change(model={"source": "pvc://models/other"})
    await world.settle()
    assert names(world) != [name]
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    assert world.condition("Stalled") is None


async def test_more_devices_than_any_node_has_is_said_and_the_pod_stays() -> None:
    world = World(accelerator={**GPU, "count": 16})
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}}
    world.api.put("/api/v1/nodes/n", node | {"status": {"allocatable": {"nvidia.com/gpu": "8"}}})
    await world.look()
    (name,) = names(world)
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes"
    stuck = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    world.set_status(name, stuck=True, conditions=[stuck | {"message": message}])
    await world.look()
    status, reason, sentence = world.condition("Ready") or ("", "", "")
    assert (status, reason) == ("False", "MoreDevicesThanAnyNode")
    assert sentence.startswith("A pod asks for 16 nvidia.com/gpu and the largest node has 8. Lower")
    assert world.condition("Stalled") == ("True", reason, sentence)
    assert names(world) == [name]


async def test_old_replicas_serve_while_a_bad_model_is_named() -> None:
    world = World(replicas=2)
    await world.settle()
    before = names(world)
    world.change(model={"source": "pvc://models/bad"})
    await world.look()
    (new,) = set(names(world)) - set(before)
    last = {"exitCode": 42, "message": '{"reason": "NotAModel", "message": "No config.json."}'}
    crashed = {"name": "runtime", "ready": False, "lastState": {"terminated": last}}
    world.set_status(new, phase="Running", containerStatuses=[crashed | {"state": {}}])
    for _ in range(5):
        await world.look()
        world.pass_time(60)
    assert world.condition("Ready") == ("False", "NotAModel", "No config.json.")
    assert world.condition("Available") == ("True", "InService", "Requests are answered.")
    assert world.status["phase"] == "Degraded"
    assert set(before) < set(names(world))


async def test_a_used_up_quota_is_told_and_tried_again() -> None:
    world = World()
    world.api.fault = failing(QuotaExceeded(), when=["pods"])
    assert isinstance(await world.look(), Retryable)
    assert (world.condition("Ready") or ("", ""))[1] == "QuotaExceeded"
    world.api.fault = lambda method, path: None
    await world.settle()
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")


async def test_a_failed_replica_stays_while_the_quota_refuses_its_successor() -> None:
    world = World()
    await world.settle()
    (failed,) = names(world)
    world.set_status(failed, phase="Failed", reason="Evicted", message="Low on memory. 1 of 2.")
    world.pass_time(60)

    def quota(method: str, path: str) -> None:
        if (method, path) == ("POST", PODS):
            raise QuotaExceeded

    world.api.fault = quota
    await world.look()
    assert names(world) == [failed]
    world.api.fault = lambda method, path: None
    await world.look()
    (successor,) = world.pods
    assert successor["metadata"]["annotations"]["mizzen.dev/restarts"] == "1"


async def test_a_missing_admin_token_is_told() -> None:
    world = World()
    world.api.drop("/api/v1/namespaces/mizzen-system/secrets/mizzen-admin")
    await world.look()
    assert world.condition("Ready") == (
        "False", "AdminTokenMissing",
        "There is no Secret mizzen-admin with a token in namespace mizzen-system. The chart makes "
        "it: run helm upgrade.",
    )  # fmt: skip


async def test_a_pod_of_somebody_else_with_the_name_of_a_replica_is_told() -> None:
    world = World()
    await world.look()
    path = f"{PODS}/{names(world)[0]}"
    stranger = world.api.objects[path]
    world.api.drop(path)
    stranger["metadata"] |= {"ownerReferences": [], "labels": {}}
    world.api.put(path, stranger)
    await world.look()
    assert (world.condition("Ready") or ("", ""))[1] == "PodRefused"
