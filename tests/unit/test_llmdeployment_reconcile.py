"""The deployment controller against an API server in memory: what is written, when, how often."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from mizzen.operator.engine.results import Done, Requeue, Retryable
from mizzen.operator.kube.errors import Conflict, KubeError, QuotaExceeded, Unavailable
from mizzen.operator.status.conditions import rfc3339
from tests.fixtures.memory_api import failing
from tests.fixtures.serving_world import CRS, PODS, World, publish_job

GPU = {"resource": "nvidia.com/gpu"}


def gates(world: World) -> dict[str, str]:
    return {
        pod["metadata"]["name"]: condition["status"]
        for pod in world.pods
        for condition in pod["status"].get("conditions", [])
        if condition["type"] == "mizzen.dev/in-service"
    }


def names(world: World) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.pods]


def in_service(world: World) -> int:
    return sum(
        condition["status"] == "True"
        for pod in world.pods
        for condition in pod["status"].get("conditions", [])
        if condition["type"] == "Ready"
    )


async def test_one_replica_takes_five_writes_of_its_own_to_ready() -> None:
    world = World()
    await world.settle()
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    shared = world.api.writes_of("secrets") + world.api.writes_of("networkpolicies")
    events = world.api.writes_of("events")
    own = [write for write in world.api.writes if write not in shared + events]
    assert [(method, path.rsplit("/", 2)[-2:]) for method, path in own] == [
        ("POST", ["team", "pods"]),
        ("PATCH", [names(world)[0], "status"]),
        ("PATCH", ["smollm2", "status"]),
        ("PATCH", ["services", "smollm2"]),
        ("PATCH", ["smollm2", "status"]),
    ]


async def test_a_hundred_looks_without_a_change_write_nothing() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    written = len(world.api.writes)
    for _ in range(100):
        world.pass_time(60)
        await world.look()
    assert len(world.api.writes) == written


async def test_a_restarted_operator_writes_nothing() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    written = len(world.api.writes)
    world.restart_operator()
    await world.settle()
    assert len(world.api.writes) == written


async def test_nothing_is_told_between_created_and_ready() -> None:
    world = World()
    await world.look()
    first = world.resource["metadata"]["resourceVersion"]
    name = names(world)[0]
    world.set_status(name, conditions=[{"type": "PodScheduled", "status": "True"}])
    await world.look()
    world.set_status(name, phase="Running", podIP="10.0.0.9")
    await world.look()
    assert world.resource["metadata"]["resourceVersion"] == first


async def test_the_gate_of_a_replica_without_adapters_opens_at_once() -> None:
    """So a replica that has loaded serves even while no operator runs."""
    world = World()
    await world.look()
    assert list(gates(world).values()) == ["True"]
    assert world.condition("Ready")[0] == "False"
    world.run_pods()
    assert in_service(world) == 1


async def test_what_only_the_answer_to_a_write_of_ours_tells_is_not_missed() -> None:
    """The scheduler was quicker than our gate, and the event of its word comes after our answer."""
    world = World()

    def refuse_a_place(method: str, path: str) -> None:
        if method == "PATCH" and "/pods/" in path:
            world.api.objects[path.removesuffix("/status")]["status"]["conditions"] = [
                {
                    "type": "PodScheduled",
                    "status": "False",
                    "reason": "Unschedulable",
                    "message": 'persistentvolumeclaim "models" not found.',
                    "lastTransitionTime": rfc3339(world.now),
                }
            ]

    world.api.fault = refuse_a_place
    result = await world.look()
    assert list(gates(world).values()) == ["True"]
    assert world.condition("Ready")[:2] == ("False", "ClaimNotFound")
    assert isinstance(result, Requeue), "and what follows from it is decided at once"


async def test_the_gate_of_a_replica_with_adapters_opens_when_they_are_loaded() -> None:
    world = World(adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.look()
    assert gates(world) == {}
    world.start(names(world)[0])
    await world.look()
    assert list(gates(world).values()) == ["True"]


async def test_a_changed_engine_setting_rolls_every_replica_and_never_falls_below_the_promise() -> (
    None
):
    world = World(replicas=3)
    await world.settle()
    before = names(world)
    world.change(engine={"maxNumSeqs": 4})
    lowest = 3
    for _ in range(60):
        await world.look()
        lowest = min(lowest, in_service(world))
        world.run_pods()
        world.pass_time(1)
    assert lowest == 3
    assert not set(before) & set(names(world))
    assert len(names(world)) == 3
    assert world.condition("Ready") == ("True", "InService", "3 of 3 replicas are in service.")


async def test_a_replica_with_requests_is_deleted_only_after_the_last_has_ended() -> None:
    world = World(replicas=2)
    await world.settle()
    victim = world.pods[-1]
    world.runtimes.in_flight[victim["status"]["podIP"]] = 2
    world.change(replicas=1)
    for _ in range(30):
        assert isinstance(await world.look(), Requeue)
        world.run_pods()
        world.pass_time(1)
    assert victim["metadata"]["name"] in names(world)
    assert gates(world)[victim["metadata"]["name"]] == "False"
    assert world.status["pods"][-1]["state"] == "Draining"
    world.runtimes.in_flight.clear()
    await world.settle()
    assert names(world) == [world.pods[0]["metadata"]["name"]] != [victim["metadata"]["name"]]


async def test_a_drain_ends_after_its_limit_whatever_is_in_flight() -> None:
    world = World(replicas=1, drain={"maxSeconds": 10})
    await world.settle()
    world.runtimes.in_flight[world.pods[0]["status"]["podIP"]] = 5
    world.change(replicas=0)
    await world.look()
    world.pass_time(9)
    await world.look()
    assert len(world.pods) == 1
    world.pass_time(1)
    await world.look()
    assert world.pods == []


async def test_a_runtime_that_does_not_answer_is_given_the_whole_time_to_drain() -> None:
    world = World(replicas=1, drain={"maxSeconds": 60})
    await world.settle()
    world.runtimes.silent.add(world.pods[0]["status"]["podIP"])
    world.change(replicas=0)
    await world.look()
    world.pass_time(59)
    await world.look()
    assert len(world.pods) == 1
    world.pass_time(1)
    await world.look()
    assert world.pods == []


async def test_scaling_down_takes_the_replica_that_serves_nobody() -> None:
    world = World(replicas=2)
    await world.settle()
    world.break_pod(world.pods[0])
    broken, good = names(world)
    world.change(replicas=1)
    await world.settle()
    assert names(world) == [good] != [broken]


async def test_a_deleted_pod_comes_back_under_another_name() -> None:
    world = World()
    await world.settle()
    (name,) = names(world)
    await world.api.request("DELETE", f"{PODS}/{name}")
    await world.settle()
    assert len(world.pods) == 1
    assert names(world) != [name]
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")


async def test_a_child_that_drifted_or_went_is_put_right() -> None:
    world = World(replicas=2)
    await world.settle()
    service = "/api/v1/namespaces/team/services/smollm2"
    drifted = world.api.objects[service] | {"spec": {"selector": {"app": "other"}}}
    world.api.put(service, drifted)
    world.api.drop("/apis/policy/v1/namespaces/team/poddisruptionbudgets/smollm2")
    await world.settle()
    selector = world.api.objects[service]["spec"]["selector"]
    assert selector["mizzen.dev/deployment"] == "smollm2"
    assert world.api.kind("PodDisruptionBudget")


async def test_the_budget_and_the_adapters_file_go_when_they_are_not_wanted() -> None:
    world = World(replicas=2, adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.settle()
    assert world.api.kind("PodDisruptionBudget") and world.api.kind("ConfigMap")
    world.change(replicas=1, adapters=[])
    await world.settle()
    assert not world.api.kind("PodDisruptionBudget")
    assert not world.api.kind("ConfigMap")


async def test_the_last_resource_takes_the_token_and_the_policy_with_it() -> None:
    world = World()
    await world.settle()
    assert "/api/v1/namespaces/team/secrets/mizzen-admin" in world.api.objects
    world.api.drop(f"{CRS}/smollm2")
    assert isinstance(await world.look(), Done)
    assert [d["metadata"]["namespace"] for d in world.api.kind("Secret").values()] == [
        "mizzen-system"
    ]
    assert not world.api.kind("NetworkPolicy")


async def test_a_namespace_made_anew_gets_a_token_again() -> None:
    world = World()
    await world.settle()
    token = "/api/v1/namespaces/team/secrets/mizzen-admin"
    # The namespace is deleted: its secret goes first, and nobody watches secrets.
    follow, world.api.on_change = world.api.on_change, lambda kind, document: None
    world.api.drop(token)
    world.api.on_change = follow
    world.api.drop(f"{CRS}/smollm2")
    await world.look()
    world.write({"model": {"source": "pvc://models/smollm2"}})
    await world.settle()
    assert token in world.api.objects


async def test_adapters_are_loaded_before_the_gate_opens() -> None:
    world = World(adapters=[{"name": "support", "source": "pvc://models/adapters/support"}])
    await world.look()
    (name,) = names(world)
    world.start(name)
    address = world.pods[0]["status"]["podIP"]
    world.runtimes.silent.add(address)
    await world.look()
    assert gates(world) == {}
    world.runtimes.silent.clear()
    await world.look()
    assert gates(world) == {name: "True"}
    assert world.runtimes.loaded[address] == {"support": None}


async def test_a_promoted_adapter_is_loaded_without_a_restart_and_reported_with_its_digest() -> (
    None
):
    world = World(replicas=2)
    await world.settle()
    before = names(world)
    publish_job(world, "support", digest="sha256:1")
    await world.settle()
    assert names(world) == before
    assert world.status["adapters"] == [
        {"name": "support", "readyReplicas": 2, "digest": "sha256:1", "job": "support"}
    ]
    assert world.condition("AdaptersReady") == (
        "True", "AdaptersLoaded", "Every replica in service has every adapter."
    )  # fmt: skip


async def test_an_adapter_of_newer_content_is_loaded_again() -> None:
    world = World()
    publish_job(world, "support", digest="sha256:1")
    await world.settle()
    publish_job(world, "support", digest="sha256:2")
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:2"}]
    assert world.status["adapters"][0]["digest"] == "sha256:2"


async def test_an_adapter_that_is_not_wanted_any_more_is_unloaded() -> None:
    world = World(adapters=[{"name": "support", "source": "pvc://models/adapters/support"}])
    await world.settle()
    world.change(adapters=[])
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{}]
    assert "adapters" not in world.status


async def test_a_refused_adapter_is_named_and_the_base_model_serves() -> None:
    world = World(adapters=[{"name": "support", "source": "pvc://models/adapters/support"}])
    world.runtimes.refused["support"] = "Its rank is 128; at most 64 fits."
    await world.settle()
    sentence = "Adapter support cannot be loaded: Its rank is 128; at most 64 fits."
    assert world.condition("AdaptersReady") == ("False", "AdapterRefused", sentence)
    assert world.condition("Degraded") == ("True", "AdapterRefused", sentence)
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    assert list(gates(world).values()) == ["True"]


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


async def test_the_pods_of_a_group_are_made_together_and_one_gate_lets_them_in() -> None:
    world = World(parallelism={"tensor": 2, "nodes": 2}, accelerator=GPU)
    await world.settle()
    assert [name[-4:] for name in names(world)] == ["-0-0", "-0-1"]
    assert list(gates(world)) == [names(world)[0]]
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    assert world.status["gpus"] == 2


async def test_no_pod_of_a_group_is_placed_before_all_are_there() -> None:
    world = World(parallelism={"tensor": 2, "nodes": 2})
    made = 0

    def refuse_the_second(method: str, path: str) -> None:
        nonlocal made
        made += method == "POST" and path == PODS
        if made >= 2:
            raise QuotaExceeded(status=403)

    world.api.fault = refuse_the_second
    await world.look()
    await world.look()
    (first,) = world.pods
    assert first["spec"]["schedulingGates"] == [{"name": "mizzen.dev/group"}]
    world.api.fault = lambda method, path: None
    await world.settle()
    assert len(world.pods) == 2
    assert not any(pod["spec"].get("schedulingGates") for pod in world.pods)
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")


async def test_a_group_that_cannot_live_ends_as_failed_with_the_reason() -> None:
    world = World(parallelism={"tensor": 2, "nodes": 2})
    last_words = json.dumps({"reason": "RankLost", "message": "Pod 1 closed its connection."})
    attempts = set()
    for _ in range(200):
        await world.look()
        for pod in world.all_pods:
            if "deletionTimestamp" in pod["metadata"]:
                world.api.drop(f"{PODS}/{pod['metadata']['name']}")
            elif pod["status"]["phase"] == "Pending" and not pod["spec"].get("schedulingGates"):
                attempts.add(pod["metadata"]["annotations"].get("mizzen.dev/restarts", "0"))
                ended = {"exitCode": 76, "message": last_words, "finishedAt": rfc3339(world.now)}
                state = [{"name": "runtime", "ready": False, "state": {"terminated": ended}}]
                world.set_status(pod["metadata"]["name"], phase="Failed", containerStatuses=state)
        world.pass_time(30)
    assert attempts == {"0", "1", "2", "3", "4", "5", "6"}
    assert world.status["phase"] == "Failed"
    stalled = world.condition("Stalled")
    assert stalled is not None
    assert stalled[1] == "RankLost"
    assert "restarted 6 times in a row" in stalled[2]


async def test_what_groups_need_comes_and_goes_with_them() -> None:
    def made_for_groups(world: World) -> list[str]:
        return sorted(
            kind
            for kind in ("Service", "NetworkPolicy")
            for document in world.api.kind(kind).values()
            if "-ranks-" in document["metadata"]["name"]
        )

    world = World(parallelism={"tensor": 2, "nodes": 2})
    await world.settle()
    assert made_for_groups(world) == ["NetworkPolicy", "Service"]
    world.change(parallelism={"tensor": 2, "nodes": 1})
    await world.look()
    assert made_for_groups(world) == ["NetworkPolicy", "Service"], "the old group still serves"
    await world.settle()
    assert made_for_groups(world) == []
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")


async def test_a_group_restarts_together_when_one_rank_ends() -> None:
    world = World(parallelism={"tensor": 2, "nodes": 2})
    await world.settle()
    before = names(world)
    ended = {"exitCode": 1, "finishedAt": "2026-09-01T12:00:00Z"}
    state = [{"name": "runtime", "ready": False, "state": {"terminated": ended}}]
    world.set_status(before[1], phase="Failed", containerStatuses=state)
    await world.settle()
    assert not set(before) & set(names(world))
    assert [pod["metadata"]["annotations"]["mizzen.dev/restarts"] for pod in world.pods] == [
        "1"
    ] * 2


async def test_a_rank_that_was_deleted_takes_its_whole_group_with_it() -> None:
    world = World(parallelism={"tensor": 2, "nodes": 2})
    await world.settle()
    before = names(world)
    await world.api.request("DELETE", f"{PODS}/{before[1]}")
    await world.settle()
    assert not set(before) & set(names(world))
    assert len(world.pods) == 2


def essence(world: World) -> list[Any]:
    """Return what must be the same however the operator was interrupted."""
    objects = sorted(
        (document["kind"], document["metadata"]["name"])
        for document in world.api.objects.values()
        if document["kind"] != "Event"
    )
    return [*objects, world.status["phase"], world.status["ready"]]


async def make_busy(world: World) -> None:
    """Walk through a start, a rollout and a scale-down, whatever fails on the way."""
    for change in ({}, {"engine": {"maxNumSeqs": 4}}, {"replicas": 1}):
        world.change(**change)
        await world.settle()


@pytest.mark.parametrize("is_lost", [False, True], ids=["before", "with its answer lost"])
async def test_being_killed_at_any_write_changes_nothing_in_the_end(is_lost: bool) -> None:
    def make() -> World:
        return World(replicas=2, parallelism={"tensor": 2, "nodes": 2})

    golden = make()
    await make_busy(golden)
    for fatal in range(len(golden.api.writes)):
        world = make()
        crashes = crash_at(world, fatal, is_lost=is_lost)
        await make_busy(world)
        assert crashes == [fatal]
        assert essence(world) == essence(golden), f"killed at write {fatal}"


class Killed(BaseException):
    """The operator process is gone."""


def crash_at(world: World, fatal: int, *, is_lost: bool) -> list[int]:
    """Kill and restart the operator at its n-th write, before it or before its answer.

    The list that is returned holds n once that has happened.
    """
    plain_look, plain_request = world.look, world.api.request
    seen = 0
    crashes: list[int] = []

    async def request(method: str, path: str, **more: Any) -> Any:
        nonlocal seen
        if method == "GET":
            return await plain_request(method, path, **more)
        seen += 1
        if seen - 1 != fatal:
            return await plain_request(method, path, **more)
        if is_lost:
            with contextlib.suppress(KubeError):
                await plain_request(method, path, **more)
        crashes.append(fatal)
        raise Killed

    async def look() -> Any:
        try:
            return await plain_look()
        except Killed:
            world.restart_operator()
            return None

    world.api.request = request  # type: ignore[method-assign]
    world.look = look  # type: ignore[method-assign]
    return crashes


@pytest.mark.parametrize("error", [Conflict(), Unavailable()], ids=["conflict", "unavailable"])
async def test_a_failing_write_is_tried_again_and_not_told(error: Exception) -> None:
    world = World(adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.look()
    world.start(names(world)[0])
    world.api.fault = failing(error, when=["pods"])  # type: ignore[arg-type]
    await world.look()
    version = world.resource["metadata"]["resourceVersion"]
    result = await world.look()
    assert isinstance(result, Retryable)
    assert world.resource["metadata"]["resourceVersion"] == version
