"""A replica that was told to take other weights, and a spec that goes back before it is known."""

from __future__ import annotations

import pytest

from mizzen.operator.desired import labels
from mizzen.operator.kube.errors import KubeError
from tests.fixtures.serving_world import World
from tests.unit.test_swap import pod_names, pod_revisions, swapped

OLD, NEW = "/mnt/pvc/models/smollm2", "/mnt/pvc/models/other"


async def told(*, is_answer_lost: bool) -> tuple[World, str]:
    """Return a world whose replica was told, and its address; nobody could note its answer."""
    world = await swapped(1)
    address = str(world.pods[0]["status"]["podIP"])
    if is_answer_lost:
        world.runtimes.silent.add(address)
        await world.look()
        world.runtimes.silent.clear()
    else:

        def fault(method: str, path: str) -> None:
            if world.runtimes.weights and "/pods/" in path:
                raise KubeError(status=500)

        world.api.fault = fault
        await world.look()
        world.api.fault = lambda method, path: None
    assert world.runtimes.weights == [(address, NEW)]
    assert labels.SWAPPING in world.pods[0]["metadata"]["annotations"]
    return world, address


@pytest.mark.parametrize("is_answer_lost", [True, False], ids=["no answer", "no note"])
async def test_a_spec_that_goes_back_meanwhile_ends_with_the_weights_of_before(
    is_answer_lost: bool,
) -> None:
    world, address = await told(is_answer_lost=is_answer_lost)
    before, first = pod_names(world), pod_revisions(world)
    world.restart_operator()
    world.change(model={"source": "pvc://models/smollm2"})
    await world.settle()
    assert world.runtimes.weights == [(address, NEW), (address, OLD)]
    assert (pod_names(world), pod_revisions(world)) == (before, first)
    assert labels.SWAPPING not in world.pods[0]["metadata"]["annotations"]
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")
    written = len(world.api.writes)
    await world.settle()
    assert len(world.api.writes) == written


@pytest.mark.parametrize("is_answer_lost", [True, False], ids=["no answer", "no note"])
async def test_a_replica_is_asked_again_for_what_it_may_have_already(is_answer_lost: bool) -> None:
    world, address = await told(is_answer_lost=is_answer_lost)
    before = pod_names(world)
    await world.settle()
    assert world.runtimes.weights == [(address, NEW)] * 2
    assert pod_names(world) == before
    assert labels.SWAPPING not in world.pods[0]["metadata"]["annotations"]
    assert pod_revisions(world) == {world.status["revision"]}


async def test_a_replica_that_refuses_the_way_back_is_replaced() -> None:
    world, _ = await told(is_answer_lost=True)
    before = pod_names(world)
    world.change(model={"source": "pvc://models/smollm2"})
    world.runtimes.weights_refused = "There are no such weights."
    await world.settle()
    assert not set(before) & set(pod_names(world))
    assert world.condition("Ready") == ("True", "InService", "1 of 1 replica is in service.")


async def test_a_replica_that_refuses_new_weights_is_as_it_was() -> None:
    world = await swapped(1)
    world.runtimes.weights_refused = "It is another model."
    await world.look()
    assert labels.SWAPPING not in world.pods[0]["metadata"]["annotations"]
