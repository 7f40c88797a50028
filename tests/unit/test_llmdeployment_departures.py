"""How replicas leave: rollouts, drains with a limit, scale-downs, and pods that others delete."""

from __future__ import annotations

from mizzen.operator.engine.results import Requeue
from tests.fixtures.serving_world import PODS, World, gates, in_service, names


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
