"""What people see of a deployment while its model is fetched, and when it cannot be."""

from __future__ import annotations

import json
from typing import Any

from mizzen.operator.crds.llmdeployment_status import LLMDeploymentStatus
from mizzen.operator.engine.results import Requeue
from tests.fixtures.serving_world import World

GIB = 2**30
SOURCE = {"source": "hf://org/large"}
HALF = {
    "stage": "Downloading",
    "bytes": 3 * GIB,
    "totalBytes": 6 * GIB,
    "bytesPerSecond": GIB // 8,
    "remainingSeconds": 24,
}


def run_without_loading(world: World) -> str:
    """Let the only pod's process run, its model still on the way; return its address."""
    (pod,) = world.pods
    world.set_status(
        pod["metadata"]["name"],
        phase="Running",
        podIP="10.0.0.1",
        containerStatuses=[
            {"name": "runtime", "ready": False, "started": False, "state": {"running": {}}}
        ],
    )
    return "10.0.0.1"


def loading(world: World) -> Any:
    (pod,) = world.status["pods"]
    return pod.get("loading")


async def fetching_world() -> World:
    world = World(model=SOURCE)
    await world.look()
    world.runtimes.files[run_without_loading(world)] = dict(HALF)
    return world


async def test_the_status_tells_how_far_the_model_has_come() -> None:
    world = await fetching_world()
    result = await world.look()
    assert loading(world) == HALF | {"observedAt": "2026-09-01T12:00:00Z"}
    assert world.condition("Progressing") == (
        "True",
        "Starting",
        "0 of 1 replica is in service; the rest is starting. The model is being fetched: "
        "3.00 of 6.00 GiB at 128.0 MiB/s, about 24 s left.",
    )
    assert isinstance(result, Requeue) and result.after_s == 5.0
    written = LLMDeploymentStatus.parse(world.status).to_api()["pods"]
    assert written == world.status["pods"], "the CRD has a place for all of it"


async def test_it_is_written_every_few_seconds_however_often_the_pods_change() -> None:
    world = await fetching_world()
    await world.look()
    before = len(world.api.writes)
    for second in range(1, 5):
        world.pass_time(1)
        world.runtimes.files["10.0.0.1"]["bytes"] = 3 * GIB + second
        await world.look()
    assert len(world.api.writes) == before
    assert world.runtimes.asked_loading == 1
    world.pass_time(1)
    await world.look()
    assert loading(world)["bytes"] == 3 * GIB + 4
    assert len(world.api.writes) == before + 1


async def test_it_goes_when_the_model_is_there_and_nothing_is_asked_any_more() -> None:
    world = await fetching_world()
    await world.look()
    (pod,) = world.pods
    world.start(pod["metadata"]["name"])
    world.pass_time(10)
    await world.settle()
    asked = world.runtimes.asked_loading
    assert loading(world) is None
    assert world.condition("Progressing")[0] == "False"
    await world.settle()
    assert world.runtimes.asked_loading == asked


async def test_a_model_on_a_claim_is_never_asked_about() -> None:
    world = World()
    await world.look()
    run_without_loading(world)
    await world.look()
    assert world.runtimes.asked_loading == 0


async def test_a_runtime_that_does_not_answer_yet_is_asked_again() -> None:
    world = World(model=SOURCE)
    await world.look()
    run_without_loading(world)
    assert (await world.look()).after_s == 5.0
    assert loading(world) is None


def end(world: World, *, code: int, reason: str, message: str) -> None:
    """Let the only pod's process end with last words, as after a failed fetch."""
    (pod,) = world.pods
    words = json.dumps({"reason": reason, "message": message})
    world.set_status(
        pod["metadata"]["name"],
        phase="Running",
        containerStatuses=[
            {
                "name": "runtime",
                "ready": False,
                "started": False,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": code, "message": words}},
            }
        ],
    )


async def test_a_failed_fetch_names_its_cause_and_a_corrected_source_serves() -> None:
    world = World(model=SOURCE)
    await world.look()
    end(world, code=42, reason="SourceNotFound", message="The hub has no repository org/large.")
    await world.look()
    assert world.condition("Ready") == (
        "False", "SourceNotFound", "The hub has no repository org/large.",
    )  # fmt: skip
    assert world.condition("Stalled")[1] == "SourceNotFound"
    world.change(model={"source": "hf://org/right"})
    await world.settle()
    assert world.condition("Ready")[0] == "True"
    assert len(world.pods) == 1


async def test_a_hub_that_is_away_is_no_stall() -> None:
    world = World(model=SOURCE)
    await world.look()
    end(world, code=1, reason="SourceUnreachable", message="The hub answers 503.")
    await world.look()
    assert world.condition("Ready") == ("False", "SourceUnreachable", "The hub answers 503.")
    assert world.condition("Stalled") is None


async def test_the_cause_of_an_earlier_attempt_goes_once_bytes_come() -> None:
    world = World(model=SOURCE)
    await world.look()
    end(world, code=42, reason="SourceForbidden", message="Give a token.")
    await world.look()
    assert world.condition("Stalled") is not None
    last = {"terminated": {"exitCode": 42, "message": "{}"}}
    address = run_without_loading(world)
    (pod,) = world.pods
    statuses = pod["status"]["containerStatuses"]
    statuses[0]["lastState"] = last
    world.set_status(pod["metadata"]["name"], containerStatuses=statuses)
    world.runtimes.files[address] = dict(HALF)
    await world.look()
    assert world.condition("Stalled") is None
    assert world.condition("Ready")[1] == "Starting"
