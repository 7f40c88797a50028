"""Replicas that take new weights while they serve: the plan, the controller, the runtime's call."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.desired.revisions import can_swap, weights_path
from mizzen.operator.planning.rollout import Budget, Creation, Replica, Standing, Step
from mizzen.operator.planning.swap import swap_step
from mizzen.operator.runtimes import HttpRuntimes, WeightsRefusedError
from tests.fixtures.runtime_server import running_tiny_model
from tests.fixtures.serving_world import World
from tests.unit.test_rollout import budgets, replicas_of, sizes
from tests.unit.test_sleep_weights import other_weights

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
S = Standing
Json = dict[str, Any]


def old(slot: int, standing: Standing = S.IN_SERVICE) -> Replica:
    return Replica(slot, "old", standing)


def new(slot: int, standing: Standing = S.IN_SERVICE) -> Replica:
    return Replica(slot, "new", standing)


def swap(replicas: list[Replica], *, desired: int = 2) -> tuple[Step, Replica | None]:
    budget = Budget(surge=1, unavailable=0)
    return swap_step(
        replicas, revision="new", swaps={"old"}, desired=desired, budget=budget, now=NOW
    )


# Replicas, wanted number: what else is done, and who gets new weights.
CASES: dict[str, tuple[list[Replica], int, Step, Replica | None]] = {
    "the first one goes first, and nothing else is done": ([old(0), old(1)], 2, Step(), old(0)),
    "the next one follows": ([new(0), old(1)], 2, Step(), old(1)),
    "one that cannot be asked now waits": ([old(0, S.UNREADY), old(1)], 2, Step(), old(1)),
    "a missing one is made of the new revision": (
        [old(0)], 2, Step(create=(Creation(1, "new"),)), old(0),
    ),
    "one that is to go anyway gets none": (
        [old(0), old(1)], 1, Step(drain=(old(1),)), old(0),
    ),
    "one whose slot is taken is replaced": (
        [new(0), old(0)], 2, Step(create=(Creation(1, "new"),)), None,
    ),
    "one that was made for the revision goes back to it": (
        [replace(old(0), born="new"), old(1)], 2, Step(), replace(old(0), born="new"),
    ),
    "one whose place was another's is replaced": (
        [replace(old(1), born="new"), replace(old(1), revision="older")], 2,
        Step(create=(Creation(0, "new"),)), replace(old(1), born="new"),
    ),
    "one that may have other weights by now takes its own once more": (
        [new(0), replace(new(1), is_unsure=True)], 2, Step(), replace(new(1), is_unsure=True),
    ),
    "one that may have them already is asked again": (
        [replace(old(0), is_unsure=True), new(1)], 2, Step(), replace(old(0), is_unsure=True),
    ),
    "one that was made for the revision takes its own weights once more": (
        [replace(new(0), born="old", is_unsure=True), new(1)], 2, Step(),
        replace(new(0), born="old", is_unsure=True),
    ),
    "a failed one is replaced by a new one": (
        [old(0, S.FAILED), old(1)], 2,
        Step(create=(Creation(2, "new", old(0, S.FAILED)),), remove=(old(0, S.FAILED),)), old(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("replicas", "desired", "step", "who"), CASES.values(), ids=CASES)
def test_swap_step(replicas: list[Replica], desired: int, step: Step, who: Replica | None) -> None:
    assert swap(replicas, desired=desired) == (step, who)


@given(st.lists(replicas_of, max_size=9, unique_by=lambda r: r.place), sizes, budgets)
def test_whoever_is_named_is_there_and_stays(
    replicas: list[Replica], desired: int, budget: Budget
) -> None:
    step, who = swap_step(
        replicas, revision="new", swaps={"old"}, desired=desired, budget=budget, now=NOW
    )
    assert {*step.drain, *step.remove} <= {*replicas}
    assert who is None or (who in replicas and who not in {*step.drain, *step.remove})


def made_from(source: str, **spec: Any) -> Json:
    return {"spec": {"model": {"source": source}} | spec, "image": "r:1"}


CHANGES = {
    "another folder of the claim": (made_from("pvc://m/b"), True),
    "another claim": (made_from("pvc://n/b"), False),
    "a folder of the image": (made_from("file:///b"), False),
    "a hub": (made_from("hf://org/b"), False),
    "an engine setting besides": (made_from("pvc://m/b", engine={"maxNumSeqs": 4}), False),
    "another image": (made_from("pvc://m/b") | {"image": "r:2"}, False),
}


@pytest.mark.parametrize(("after", "is_enough"), CHANGES.values(), ids=CHANGES)
def test_weights_alone_can_be_swapped(after: Json, is_enough: bool) -> None:
    assert can_swap(made_from("pvc://m/a"), after) is is_enough


@pytest.mark.parametrize(
    ("source", "path"), [("pvc://m/b", "/mnt/pvc/m/b"), ("file:///b", ""), ("hf://org/b", "")]
)
def test_weights_are_swapped_from_a_claim_alone(source: str, path: str) -> None:
    spec = LLMDeploymentSpec.parse({"model": {"source": source}})
    assert weights_path(spec) == path


# The controller.


async def swapped(replicas: int = 2, **more: Any) -> World:
    world = World(replicas=replicas, rollout={"strategy": "InPlaceWeights", **more})
    await world.settle()
    world.change(model={"source": "pvc://models/other"})
    return world


def pod_names(world: World) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.pods]


def pod_revisions(world: World) -> set[str]:
    return {pod["metadata"]["labels"]["mizzen.dev/revision"] for pod in world.pods}


async def test_replicas_take_new_weights_one_after_the_other_and_stay() -> None:
    world = await swapped()
    before, first = pod_names(world), world.status["revision"]
    await world.look()
    assert len(world.runtimes.weights) == 1
    assert world.status["updatedReplicas"] == 1
    await world.settle()
    addresses = [pod["status"]["podIP"] for pod in world.pods]
    assert world.runtimes.weights == [(ip, "/mnt/pvc/models/other") for ip in addresses]
    assert pod_names(world) == before
    assert pod_revisions(world) == {world.status["revision"]} != {first}
    assert world.condition("Ready") == ("True", "InService", "2 of 2 replicas are in service.")
    assert "rollout" not in world.status
    assert world.runtimes.drained == []
    written = len(world.api.writes)
    world.restart_operator()
    await world.settle()
    assert len(world.api.writes) == written


async def test_the_way_back_is_in_place_too() -> None:
    world = await swapped()
    before, first = pod_names(world), pod_revisions(world)
    await world.settle()
    world.change(model={"source": "pvc://models/smollm2"})
    await world.settle()
    assert pod_names(world) == before
    assert pod_revisions(world) == first
    assert {path for _, path in world.runtimes.weights[2:]} == {"/mnt/pvc/models/smollm2"}
    assert world.condition("Ready") == ("True", "InService", "2 of 2 replicas are in service.")
    assert "rollout" not in world.status


async def test_what_was_swapped_before_a_rollback_is_swapped_back() -> None:
    world = await swapped(progressDeadlineSeconds=60)
    before, first = pod_names(world), pod_revisions(world)
    world.runtimes.silent.add(world.pods[1]["status"]["podIP"])
    for _ in range(15):
        await world.look()
        world.pass_time(3)
    assert len(pod_revisions(world)) == 2
    for _ in range(15):
        await world.look()
        world.pass_time(3)
    assert world.status["rollout"]["failure"]["reason"] == "ProgressDeadlineExceeded"
    await world.settle()
    assert pod_names(world) == before
    assert pod_revisions(world) == first


async def test_later_replicas_and_the_way_back_have_names_of_their_own() -> None:
    world = await swapped()
    await world.settle()
    world.change(replicas=3)
    await world.settle()
    assert len(set(pod_names(world))) == 3
    # Back, and this time by new replicas: none may take the name of one that is still there.
    world.change(model={"source": "pvc://models/smollm2"}, rollout={"maxSurge": 3})
    await world.settle(looks=80)
    assert len(set(pod_names(world))) == 3
    assert pod_revisions(world) == {world.status["revision"]}
    assert all("pvc/models/smollm2" in p["spec"]["containers"][0]["args"][1] for p in world.pods)


async def test_weights_that_are_refused_come_with_new_replicas_and_the_reason() -> None:
    world = await swapped()
    before = pod_names(world)
    world.runtimes.weights_refused = "It is another model."
    await world.look()
    assert world.status["rollout"]["inPlaceRefused"] == "It is another model."
    await world.look()
    assert "Replicas are replaced: It is another model." in world.condition("Progressing")[2]
    await world.settle()
    assert not set(before) & set(pod_names(world))
    assert "rollout" not in world.status


async def test_a_runtime_that_does_not_answer_is_asked_again() -> None:
    world = await swapped(1)
    (pod,) = world.pods
    world.runtimes.silent.add(pod["status"]["podIP"])
    await world.look()
    assert world.status["updatedReplicas"] == 0
    world.runtimes.silent.clear()
    await world.settle()
    assert pod_names(world) == [pod["metadata"]["name"]]
    assert world.status["phase"] == "Ready"


async def test_a_container_that_restarted_has_its_old_weights_and_is_replaced() -> None:
    world = await swapped(1)
    await world.settle()
    (pod,) = world.pods
    statuses = copy.deepcopy(pod["status"]["containerStatuses"])
    statuses[0]["restartCount"] = 1
    world.set_status(pod["metadata"]["name"], containerStatuses=statuses)
    await world.settle()
    (successor,) = world.pods
    assert successor["metadata"]["uid"] != pod["metadata"]["uid"]
    assert successor["spec"]["containers"][0]["args"][1] == "/mnt/pvc/models/other"
    assert world.runtimes.weights and len(world.runtimes.weights) == 1


async def test_another_change_beside_the_weights_replaces_the_replicas() -> None:
    world = World(replicas=1, rollout={"strategy": "InPlaceWeights"})
    await world.settle()
    before = pod_names(world)
    world.change(model={"source": "pvc://models/other"}, engine={"maxNumSeqs": 4})
    await world.settle()
    assert world.runtimes.weights == []
    assert not set(before) & set(pod_names(world))


async def test_weights_that_never_arrive_are_rolled_back_after_the_deadline() -> None:
    world = await swapped(1, progressDeadlineSeconds=60)
    world.runtimes.silent.add(world.pods[0]["status"]["podIP"])
    before = pod_names(world)
    for _ in range(30):
        await world.look()
        world.pass_time(3)
    assert world.status["rollout"]["failure"]["reason"] == "ProgressDeadlineExceeded"
    assert pod_names(world) == before


# The runtime.


async def test_the_runtime_swaps_or_says_why_not(tmp_path: Path) -> None:
    path = other_weights(tmp_path / "new")
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as running:
        runtimes = HttpRuntimes(Path("/nowhere"), admin_port=running.server.ports.admin)
        assert await runtimes.load_weights("127.0.0.1", str(path))
        wide = str(other_weights(tmp_path / "wide", width=128))
        for refused, words in ((wide, "another model"), ("/etc", "only from below")):
            with pytest.raises(WeightsRefusedError, match=words):
                await runtimes.load_weights("127.0.0.1", refused)
    assert not await HttpRuntimes(Path("/nowhere"), admin_port=1).load_weights("127.0.0.1", "/x")
