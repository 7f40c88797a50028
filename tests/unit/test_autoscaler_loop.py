"""The autoscaler's loop on a small world: what it writes, when, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from mizzen.operator.kube.errors import KubeError
from mizzen.operator.metrics.figures import Measured, Name, Target
from mizzen.operator.planning.signals import Engines
from tests.fixtures.autoscaled_world import SCALING, ZERO, Scaled, gate, load
from tests.fixtures.memory_api import failing
from tests.fixtures.serving_world import CRS

HPAS = "/apis/autoscaling/v2/horizontalpodautoscalers"  # asked for in all namespaces at once


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
    assert all(gate(pod) == "True" for pod in scaled.world.pods)


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
    assert [gate(pod) for pod in scaled.world.pods] == ["True"]


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


async def test_replicas_in_service_are_told_to_the_metrics_source() -> None:
    scaled = Scaled()
    scaled.metrics.now = load(10)
    await scaled.run(90)
    target = scaled.metrics.targets[0]
    assert (target.settled, len(target.addresses)) == (3, 3)
    assert replace(target, settled=0, addresses=()).name == ("team", "smollm2")
