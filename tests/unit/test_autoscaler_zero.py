"""The autoscaler's loop at zero: how a deployment goes there, and how requests bring it back."""

from __future__ import annotations

import pytest

from mizzen.operator.controllers.autoscaler_observe import wake_of
from mizzen.operator.planning.signals import Wake
from tests.fixtures.autoscaled_world import ZERO, Scaled, gate, load
from tests.fixtures.serving_world import CRS, KEY, World


async def test_zero_comes_after_the_gates_were_closed_and_nobody_asked() -> None:
    scaled = Scaled(**ZERO)
    scaled.metrics.now = load(1)
    await scaled.run(30)
    assert scaled.world.condition("Ready") is not None
    scaled.metrics.now = load(0)
    seen, told = [], set()
    for _ in range(30):
        await scaled.run(5)
        told.add((scaled.world.condition("Ready"), scaled.world.status["phase"]))
        pods = scaled.world.pods
        gates = [gate(pod) for pod in pods]
        seen.append((scaled.scaling.get("holding", False), gates))
    first = next(index for index, (holding, _) in enumerate(seen) if holding)
    assert seen[first - 1][1] == ["True"]
    assert seen[first][1] == ["False"]  # the gateway holds requests from here on
    assert seen[-1][1] == []
    assert scaled.scaling["desired"] == 0
    assert scaled.world.status["phase"] == "Stopped"
    assert {(ready and ready[0], phase) for ready, phase in told} == {
        ("True", "Ready"), ("True", "Stopping"), ("True", "Stopped"),
    }  # fmt: skip


HELD = {"20": 20, "\u00b2": 0, "9" * 5000: 0, "-1": 0, "": 0}


@pytest.mark.parametrize(("text", "held"), HELD.items(), ids=["20", "two", "huge", "less", "none"])
def test_a_wake_that_is_no_number_of_requests_is_a_wake_all_the_same(text: str, held: int) -> None:
    annotation = f"2026-09-01T13:00:00Z;held={text}"
    resource = {"metadata": {"annotations": {"mizzen.dev/wake": annotation}}}
    assert wake_of(resource) == Wake(token=annotation[:128], held=held)


async def test_a_wake_starts_as_many_as_the_held_requests_need() -> None:
    scaled = Scaled(**ZERO)
    await scaled.run(200)
    assert scaled.world.pods == []
    wake(scaled.world, "2026-09-01T13:00:00Z;held=20")
    scaled.scaler.notice(KEY)
    await scaled.run(10)
    assert scaled.scaling["history"][0]["reason"] == "Woken"
    assert len(scaled.world.pods) == 3
    assert scaled.scaling["history"][0]["formula"] == "first size 3 = ceil(20 held / 8 each)"


async def test_a_request_that_comes_while_gates_are_closed_opens_them_again() -> None:
    scaled = Scaled(**ZERO)
    await scaled.run(20)
    while not scaled.world.status.get("scaling", {}).get("holding"):
        await scaled.run(5)
    uids = [pod["metadata"]["uid"] for pod in scaled.world.pods]
    wake(scaled.world, "2026-09-01T13:00:00Z;held=1")
    await scaled.run(15)
    assert [pod["metadata"]["uid"] for pod in scaled.world.pods] == uids
    assert [gate(pod) for pod in scaled.world.pods] == ["True"]


def wake(world: World, text: str) -> None:
    resource = world.resource
    resource["metadata"].setdefault("annotations", {})["mizzen.dev/wake"] = text
    world.api.put(f"{CRS}/smollm2", resource)
