"""Adapters of a deployment: loaded before the gate opens, by content, and refused by name."""

from __future__ import annotations

from mizzen.operator.engine.results import Requeue
from tests.fixtures.serving_world import World, gates, names, publish_job


async def test_the_gate_of_a_replica_with_adapters_opens_when_they_are_loaded() -> None:
    world = World(adapters=[{"name": "a", "source": "pvc://models/a"}])
    await world.look()
    assert gates(world) == {}
    world.start(names(world)[0])
    await world.look()
    assert list(gates(world).values()) == ["True"]


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


async def test_the_last_adapter_is_unloaded_also_from_a_replica_that_answers_later() -> None:
    world = World(adapters=[{"name": "support", "source": "pvc://models/adapters/support"}])
    await world.settle()
    address = world.pods[0]["status"]["podIP"]
    for trouble in (world.runtimes.silent, world.runtimes.holding):
        world.change(adapters=[{"name": "support", "source": "pvc://models/adapters/support"}])
        await world.settle()
        trouble.add(address)
        world.change(adapters=[])
        await world.settle()
        assert await world.look() == Requeue(2.0)
        assert world.runtimes.loaded[address] == {"support": None}
        trouble.clear()
        await world.settle()
        assert world.runtimes.loaded[address] == {}
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
