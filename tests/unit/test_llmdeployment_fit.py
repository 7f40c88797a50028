"""`status.plan`: what a model takes, and the change that is refused because it cannot fit."""

from __future__ import annotations

from typing import Any

from mizzen.operator.crds.llmdeployment_status import LLMDeploymentStatus
from mizzen.operator.engine.results import Terminal
from mizzen.operator.planning.fit import GIB
from tests.fixtures.serving_world import World

GPUS = {"resource": "nvidia.com/gpu"}
# Llama 3 8B on an H100, as its runtime says.
TOLD: dict[str, Any] = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "kvHeads": 8,
    "headDim": 128,
    "contextTokens": 131072,
    "parameters": 8_030_261_248,
    "layerParameters": 218_112_000,
    "tableParameters": 525_336_576,
    "dtype": "bfloat16",
    "deviceBytes": 80 * GIB,
    "kvTokens": 440_000,
    "maxModelLen": 8192,
}


async def serving_world(told: dict[str, Any] | None = None, **spec: Any) -> World:
    world = World(accelerator=GPUS, model={"source": "pvc://m/x", "maxModelLen": 8192} | spec)
    await world.settle()
    for pod in world.pods:
        world.runtimes.models[pod["status"]["podIP"]] = TOLD if told is None else told
    await world.settle()
    return world


async def test_the_first_replica_tells_what_the_model_takes() -> None:
    world = await serving_world()
    plan = world.status["plan"]
    assert plan["weightBytes"] == 2 * 8_030_261_248
    assert plan["kvBytesPerToken"] == 128 * 1024
    assert (plan["tensor"], plan["dtype"], plan["deviceBytes"]) == (1, "bfloat16", 80 * GIB)
    assert (plan["kvTokens"], plan["maxModelLen"]) == (440_000, 8192)
    assert plan["maxConcurrency"] == 440_000 // 2048
    assert LLMDeploymentStatus.parse(world.status).to_api()["plan"] == plan


async def test_it_is_asked_for_once_and_again_for_another_revision() -> None:
    world = await serving_world()
    asked = world.runtimes.asked_model
    await world.settle()
    assert world.runtimes.asked_model == asked
    before = world.status["plan"]["revision"]
    world.change(model={"source": "pvc://m/x", "maxModelLen": 4096})
    await world.settle()
    for pod in world.pods:
        world.runtimes.models[pod["status"]["podIP"]] = TOLD | {"maxModelLen": 4096}
    await world.settle()
    assert world.status["plan"]["revision"] != before
    assert world.status["plan"]["maxModelLen"] == 4096


async def test_a_runtime_that_tells_nothing_or_nonsense_leaves_no_plan() -> None:
    for told in ({}, TOLD | {"kvTokens": "many"}, TOLD | {"dtype": "int3"}, TOLD | {"layers": 0}):
        world = await serving_world(told)
        assert "plan" not in world.status
        assert world.condition("Ready")[0] == "True"  # type: ignore[index]


async def test_a_context_too_long_for_the_device_is_refused_with_the_numbers() -> None:
    world = await serving_world(TOLD | {"deviceBytes": 24 * GIB, "kvTokens": 50_000})
    pods = [pod["metadata"]["name"] for pod in world.pods]
    world.change(model={"source": "pvc://m/x", "maxModelLen": 131072})
    result = await world.look()
    assert isinstance(result, Terminal)
    accepted = world.condition("Accepted")
    assert accepted is not None and accepted[:2] == ("False", "DoesNotFit")
    assert accepted[2] == (
        "On 1 x nvidia.com/gpu a rank needs 15.0 GiB of the device's 24.0 GiB for weights and "
        "16.0 GiB for one request of 131072 tokens, and 7.3 GiB are left for the KV cache. To "
        "make it fit: set the maximum length to at most 59472 tokens; or raise tensor "
        "parallelism above 1; or raise pipeline parallelism above 1; or choose a device with "
        "more memory."
    )
    assert [pod["metadata"]["name"] for pod in world.pods] == pods, "what runs is left as it is"
    world.change(model={"source": "pvc://m/x", "maxModelLen": 8192})
    await world.settle()
    assert world.condition("Accepted")[0] == "True"  # type: ignore[index]


async def test_ranks_that_the_heads_cannot_be_spread_over_are_refused_on_a_cpu_too() -> None:
    world = World(model={"source": "pvc://m/x"})
    await world.settle()
    told = {name: value for name, value in TOLD.items() if name != "deviceBytes"}
    for pod in world.pods:
        world.runtimes.models[pod["status"]["podIP"]] = told
    await world.settle()
    assert "deviceBytes" not in world.status["plan"]
    world.change(parallelism={"tensor": 23})
    await world.look()
    accepted = world.condition("Accepted")
    assert accepted is not None and accepted[:2] == ("False", "DoesNotFit")
    assert "32 query heads over 8 KV heads cannot be spread over 23 ranks" in accepted[2]


async def test_stages_are_planned_from_the_sizes_a_whole_replica_told() -> None:
    small = {"deviceBytes": 16 * GIB, "kvTokens": 100_000}
    world = await serving_world(TOLD | small)
    for stages, expected in ((33, "32 layers and cannot be cut into 33 stages"), (2, "")):
        world.change(parallelism={"pipeline": stages})
        await world.look()
        status, _, message = world.condition("Accepted")  # type: ignore[misc]
        assert (status, expected in message) == ("False" if expected else "True", True)
    await world.settle()
    for pod in world.pods:
        world.runtimes.models[pod["status"]["podIP"]] = TOLD | small
    await world.settle()
    plan = world.status["plan"]
    assert (plan["tensor"], plan["pipeline"]) == (1, 2)
    assert LLMDeploymentStatus.parse(world.status).to_api()["plan"] == plan


async def test_a_runtime_that_does_not_tell_the_size_of_a_layer_is_planned_with_all_the_same() -> (
    None
):
    parts = ("layerParameters", "tableParameters")
    world = await serving_world({name: size for name, size in TOLD.items() if name not in parts})
    assert not world.status["plan"]["model"].keys() & set(parts)
    world.change(parallelism={"pipeline": 2})
    await world.look()
    assert world.condition("Accepted")[0] == "True"  # type: ignore[index]


async def test_what_other_devices_or_another_model_hold_is_not_guessed() -> None:
    tight = TOLD | {"deviceBytes": 24 * GIB, "kvTokens": 50_000}
    for change in (
        {"accelerator": {"resource": "amd.com/gpu"}},
        {"model": {"source": "pvc://m/y", "maxModelLen": 131072}},
        {"podTemplatePatch": {"spec": {"nodeSelector": {"gpu": "h200"}}}},
    ):
        world = await serving_world(tight)
        world.change(**({"model": {"source": "pvc://m/x", "maxModelLen": 131072}} | change))
        await world.look()
        assert world.condition("Accepted")[0] == "True"  # type: ignore[index]
