"""The autoscaler's loop on a small world: what it writes, when, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mizzen.operator.controllers.autoscaler import Autoscaler
from mizzen.operator.controllers.autoscaler_observe import wake_of
from mizzen.operator.engine.key import Key
from mizzen.operator.kube.errors import KubeError
from mizzen.operator.metrics.figures import Measured, Name, Target
from mizzen.operator.planning.signals import Engines, Signal, Traffic, Wake
from mizzen.operator.status.conditions import rfc3339
from tests.fixtures.memory_api import failing
from tests.fixtures.serving_world import CRS, KEY, World

HPAS = "/apis/autoscaling/v2/horizontalpodautoscalers"  # asked for in all namespaces at once
SCALING = {"min": 1, "max": 6, "targets": {"concurrency": 4}}


class FakeMetrics:
    """Says what the test wants, and remembers who was asked for."""

    def __init__(self) -> None:
        self.now = load(0)
        self.targets: list[Target] = []

    async def collect(self, targets: Sequence[Target]) -> Mapping[Name, Measured]:
        self.targets = list(targets)
        return {target.name: self.now for target in targets}

    async def close(self) -> None:
        pass


def load(running: float) -> Measured:
    traffic = Traffic(arrivals_per_s=Signal(running), in_flight=Signal(running), held=Signal(0.0))
    return Measured(traffic=traffic, engines=Engines(running=Signal(running), waiting=Signal(0.0)))


class Scaled:
    """A world whose autoscaler looks whenever the test says so."""

    def __init__(self, **scaling: Any) -> None:
        self.world = World(scaling=SCALING | scaling)
        self.world.api.clock = lambda: rfc3339(self.world.now)
        self.metrics = FakeMetrics()
        self.due: list[Key] = []
        self.start()

    def start(self) -> None:
        """Begin with an empty memory, as after a restart."""
        self.scaler = Autoscaler(
            kube=self.world.kube,
            facts=self.world.facts,
            source=self.metrics,
            on_change=self.due.append,
        )

    async def look(self) -> None:
        await self.scaler.look(now=self.world.now)

    async def run(self, seconds: int) -> None:
        """Let everything go on: loop, reconcile, pods, time."""
        for _ in range(0, seconds, 5):
            await self.look()
            await self.world.look()
            self.world.run_pods()
            self.world.pass_time(5)

    @property
    def scaling(self) -> dict[str, Any]:
        found: dict[str, Any] = self.world.status["scaling"]
        return found

    def writes(self) -> int:
        return len(self.world.api.writes_of("/llmdeployments/smollm2/status"))


async def test_load_makes_replicas_and_status_says_why() -> None:
    scaled = Scaled()
    await scaled.run(20)
    scaled.metrics.now = load(10)
    await scaled.run(20)
    assert len(scaled.world.pods) == 3
    assert scaled.scaling["desired"] == 3
    assert scaled.scaling["formula"] == "concurrency 3 = ceil(10 in all / 4 each)"
    assert scaled.scaling["inputs"]["running"] == "10"
    newest = scaled.scaling["history"][0]
    assert (newest["before"], newest["after"], newest["reason"]) == (1, 3, "LoadRose")
    assert newest["formula"] == scaled.scaling["formula"]
    assert scaled.world.condition("ScalingActive") == (
        "True", "CapacityUnknown", scaled.scaling["message"],
    )  # fmt: skip
    assert scaled.world.status["ready"] == "3/3"


async def test_the_answer_survives_the_deployments_own_status_writes() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(10)
    await scaled.run(30)
    before = scaled.scaling
    scaled.world.change(drain={"maxSeconds": 5})
    await scaled.world.settle()
    assert scaled.scaling == before
    assert len(scaled.world.pods) == 3


async def test_nothing_is_written_while_nothing_changes() -> None:
    scaled = Scaled()
    await scaled.run(130)
    before = len(scaled.world.api.writes)
    await scaled.run(600)
    assert len(scaled.world.api.writes) == before


async def test_figures_that_move_are_written_once_a_minute() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(1.0)
    await scaled.run(60)
    before = scaled.writes()
    for tick in range(120):
        scaled.metrics.now = load(1.0 + tick / 100)
        await scaled.run(5)
    assert 5 <= scaled.writes() - before <= 10


async def test_a_restarted_operator_keeps_number_history_and_window() -> None:
    scaled = Scaled()
    await scaled.run(20)
    scaled.metrics.now = load(20)
    await scaled.run(60)
    known = scaled.scaling
    assert known["desired"] == 5
    scaled.metrics.now = load(1)
    await scaled.run(150)
    scaled.world.restart_operator()
    scaled.start()
    await scaled.run(290)
    assert scaled.scaling["desired"] == 5
    assert scaled.scaling["history"] == known["history"]
    await scaled.run(60)
    assert scaled.scaling["desired"] == 3


async def test_unknown_load_takes_nothing_away_and_is_told_within_a_minute() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(10)
    await scaled.run(60)
    scaled.metrics.now = Measured()
    await scaled.run(15)
    condition = scaled.world.condition("ScalingActive")
    assert condition is not None
    assert condition[:2] == ("False", "SignalsUnknown")
    await scaled.run(1200)
    assert len(scaled.world.pods) == 3
    assert scaled.scaling["inputs"]["running"] == "unknown"


async def test_replicas_nobody_could_scrape_yet_are_awaited_without_alarm() -> None:
    scaled = Scaled()
    await scaled.run(20)
    scaled.metrics.now = replace(load(0), engines=Engines(is_unscraped=True))
    await scaled.run(10)
    assert scaled.world.condition("ScalingActive") == (
        "True", "AwaitingScrape",
        "The replicas in service are new and none has been scraped yet. Until one has, arrivals "
        "may raise their number and nothing lowers it.",
    )  # fmt: skip
    assert scaled.scaling["reason"] == "AwaitingScrape"
    scaled.metrics.now = load(0)
    await scaled.run(10)
    assert scaled.scaling["reason"] == "Steady"


async def test_another_autoscaler_stops_ours_and_is_named() -> None:
    scaled = Scaled()
    await scaled.run(20)
    scaled.world.api.put(
        f"{HPAS}/web",
        {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": "web", "namespace": "team"},
            "spec": {
                "scaleTargetRef": {
                    "apiVersion": "mizzen.dev/v1alpha1",
                    "kind": "LLMDeployment",
                    "name": "smollm2",
                }
            },
        },
    )
    scaled.metrics.now = load(20)
    scaled.world.pass_time(30)
    await scaled.run(60)
    condition = scaled.world.condition("ScalingActive")
    assert condition is not None
    assert condition[:2] == ("False", "OtherAutoscaler")
    assert condition[2].startswith("HorizontalPodAutoscaler web scales this deployment too")
    assert len(scaled.world.pods) == 1
    scaled.world.api.drop(f"{HPAS}/web")
    await scaled.run(60)
    assert len(scaled.world.pods) == 5


async def test_a_dry_run_only_reports() -> None:
    scaled = Scaled(dryRun=True)
    scaled.metrics.now = load(10)
    await scaled.run(60)
    assert (scaled.scaling["desired"], scaled.scaling["recommended"]) == (1, 3)
    condition = scaled.world.condition("ScalingActive")
    assert condition is not None
    assert condition[:2] == ("False", "DryRun")
    assert len(scaled.world.pods) == 1
    scaled.world.change(scaling=SCALING)
    await scaled.run(20)
    assert len(scaled.world.pods) == 3


async def test_a_dry_run_beside_a_fixed_size_leaves_that_size() -> None:
    scaled = Scaled(dryRun=True)
    scaled.world.change(replicas=2)
    scaled.metrics.now = load(20)
    await scaled.run(60)
    assert len(scaled.world.pods) == 2
    assert scaled.scaling["recommended"] == 5


async def test_a_fixed_size_takes_the_answer_away() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(10)
    await scaled.run(60)
    spec = scaled.world.resource["spec"]
    del spec["scaling"]
    scaled.world.write(spec | {"replicas": 2})
    await scaled.run(30)
    assert "scaling" not in scaled.world.status
    assert len(scaled.world.pods) == 2
    condition = scaled.world.condition("ScalingActive")
    assert condition is not None
    assert condition[1] == "ScalingDisabled"


@pytest.mark.parametrize("scaling", [SCALING, SCALING | {"dryRun": True}], ids=["", "dry"])
async def test_scaling_a_running_deployment_begins_at_its_size(scaling: dict[str, Any]) -> None:
    scaled = Scaled()
    spec = {"model": {"source": "pvc://models/smollm2"}, "replicas": 4}
    scaled.world.write(spec)
    await scaled.world.settle()
    del spec["replicas"]
    before = [pod["metadata"]["uid"] for pod in scaled.world.pods]
    scaled.world.write(spec | {"scaling": scaling})
    scaled.metrics.now = load(1)
    await scaled.world.look()  # before the autoscaler has looked
    await scaled.run(120)
    assert [pod["metadata"]["uid"] for pod in scaled.world.pods] == before
    assert all(_gate(pod) == "True" for pod in scaled.world.pods)


async def test_an_answer_that_could_not_be_written_is_given_again() -> None:
    scaled = Scaled()
    await scaled.run(20)
    scaled.metrics.now = load(10)
    scaled.world.api.fault = failing(KubeError(status=500), when=["smollm2/status"])
    await scaled.look()
    assert scaled.scaling["desired"] == 1
    scaled.world.api.fault = lambda method, path: None
    await scaled.look()
    assert scaled.scaling["desired"] == 3
    assert scaled.scaling["history"][0]["after"] == 3


async def test_a_time_zone_that_does_not_exist_is_told_and_nothing_moves() -> None:
    nowhere = {
        "name": "day", "timezone": "Europe/Atlantis", "days": ["Mon"],
        "start": "08:00", "end": "18:00", "min": 2, "max": 4,
    }  # fmt: skip
    scaled = Scaled(schedules=[nowhere])
    await scaled.run(20)
    condition = scaled.world.condition("ScalingActive")
    assert condition is not None
    assert condition[:2] == ("False", "TimeZoneUnknown")
    assert "Europe/Atlantis" in condition[2]
    assert len(scaled.world.pods) == 1


async def test_a_time_zone_that_does_not_exist_holds_no_requests() -> None:
    scaled = Scaled(**ZERO)
    scaled.metrics.now = load(0)
    while not scaled.world.status.get("scaling", {}).get("holding"):
        await scaled.run(5)
    office = {"name": "day", "timezone": "Europe/Atlantis", "start": "08:00", "end": "18:00"}
    bounds = {"days": ["Mon"], "min": 0, "max": 4}
    scaling = scaled.world.resource["spec"]["scaling"]
    scaled.world.change(scaling=scaling | {"schedules": [office | bounds]})
    await scaled.run(10)
    assert scaled.world.condition("ScalingActive")[1] == "TimeZoneUnknown"
    assert "holding" not in scaled.scaling
    assert [_gate(pod) for pod in scaled.world.pods] == ["True"]


# Zero and back.

ZERO = {"min": 0, "idle": {"toZeroAfterSeconds": 60}}


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
        gates = [_gate(pod) for pod in pods]
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


async def test_a_deployment_that_cannot_be_sized_keeps_no_other_from_it() -> None:
    scaled = Scaled()
    await scaled.run(20)
    later = scaled.world.resource | {"status": {}}
    later["metadata"] = {"name": "later", "namespace": "team"}
    scaled.world.api.put(f"{CRS}/later", later)

    async def collect(targets: Sequence[Target]) -> Mapping[Name, Measured]:
        assert [target.name[1] for target in targets] == ["smollm2", "later"]
        return {targets[1].name: load(20)}

    scaled.metrics.collect = collect  # type: ignore[method-assign]
    await scaled.look()
    assert scaled.world.api.objects[f"{CRS}/later"]["status"]["scaling"]["desired"] == 1


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
    assert [_gate(pod) for pod in scaled.world.pods] == ["True"]


async def test_replicas_in_service_are_told_to_the_metrics_source() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(10)
    await scaled.run(90)
    target = scaled.metrics.targets[0]
    assert (target.settled, len(target.addresses)) == (3, 3)
    assert replace(target, settled=0, addresses=()).name == ("team", "smollm2")


def wake(world: World, text: str) -> None:
    resource = world.resource
    resource["metadata"].setdefault("annotations", {})["mizzen.dev/wake"] = text
    world.api.put(f"{CRS}/smollm2", resource)


def _gate(pod: dict[str, Any]) -> str:
    conditions = pod["status"].get("conditions", [])
    gates = [c["status"] for c in conditions if c["type"] == "mizzen.dev/in-service"]
    return gates[0] if gates else ""
