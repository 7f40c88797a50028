"""An operator killed or refused at any of its writes ends where an undisturbed one does."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from mizzen.operator.engine.results import Retryable
from mizzen.operator.kube.errors import Conflict, KubeError, Unavailable
from tests.fixtures.memory_api import failing
from tests.fixtures.serving_world import World, names


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
