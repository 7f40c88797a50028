"""Replicas of several pods: made, placed, restarted and given up together."""

from __future__ import annotations

import json

import pytest

from mizzen.operator.kube.errors import QuotaExceeded
from mizzen.operator.status.conditions import rfc3339
from tests.fixtures.serving_world import PODS, World, gates, names

GPU = {"resource": "nvidia.com/gpu"}


@pytest.mark.parametrize("spread", ["tensor", "pipeline"])
async def test_the_pods_of_a_group_are_made_together_and_one_gate_lets_them_in(spread: str) -> None:
    world = World(parallelism={spread: 2, "nodes": 2}, accelerator=GPU)
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
