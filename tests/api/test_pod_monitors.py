"""A real Prometheus, scraping as the chart's PodMonitors say, answers like a direct scrape."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.chart.__main__ import CHART
from hack.chart.install import find_helm
from hack.prometheus import PrometheusServer
from mizzen.operator.desired.serving import PodPlace, build_pod
from mizzen.operator.metrics.figures import Measured
from mizzen.operator.metrics.prometheus import PrometheusSource
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.operator.planning.signals import Signal
from tests.fixtures.exporters import Exporters
from tests.fixtures.metrics_story import NAME, TARGET
from tests.fixtures.pod_monitors import FoundPod, scrape_configs
from tests.fixtures.wanted_serving import serving

pytestmark = pytest.mark.api

Json = dict[str, Any]
HOME = "mizzen-home"
HELM = find_helm()
# Both sources take a rate over thirty seconds, but not over the same thirty.
ALIKE = 0.1


@pytest.fixture(scope="module")
def chart() -> list[Json]:
    if HELM is None:
        pytest.skip("no helm here; `make bin` builds one")
    values = {"metrics": {"podMonitor": {"enabled": True, "intervalSeconds": 1}}}
    done = subprocess.run(
        [HELM, "template", "mizzen", str(CHART), "--namespace", HOME, "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=True,
    )
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture
def exporters() -> Iterator[Exporters]:
    made = Exporters()
    yield made
    made.stop()


def found_pods(chart: Sequence[Json], exporters: Exporters) -> list[FoundPod]:
    """Return the gateway's pod as the chart makes it, and the runtimes' as the operator does."""
    [template] = [
        document["spec"]["template"]
        for document in chart
        if document["kind"] == "Deployment" and document["metadata"]["name"] == "mizzen-gateway"
    ]
    gateway = template | {
        "metadata": template["metadata"] | {"name": "mizzen-gateway-0", "namespace": HOME}
    }
    pods = [
        build_pod(serving(), PodPlace(revision="r1", slot=slot, rank=0))
        for slot in range(len(exporters.runtimes))
    ]
    return [
        FoundPod(gateway, exporters.address("gateway")),
        *(
            FoundPod(pod, exporters.address(name))
            for pod, name in zip(pods, exporters.runtimes, strict=True)
        ),
    ]


@pytest.fixture
def server(
    chart: list[Json], exporters: Exporters, prometheus: Path, tmp_path: Path
) -> Iterator[str]:
    monitors = [document for document in chart if document["kind"] == "PodMonitor"]
    config = {"scrape_configs": scrape_configs(monitors, found_pods(chart, exporters))}
    with PrometheusServer(prometheus, tmp_path, config) as url:
        yield url


@pytest.fixture
async def sources(
    exporters: Exporters, server: str
) -> AsyncIterator[tuple[ScrapeSource, PrometheusSource]]:
    async def gateways() -> Sequence[str]:
        return [exporters.address("gateway")]

    direct, asked = ScrapeSource(gateways), PrometheusSource(server, scrape_s=1)
    yield direct, asked
    await direct.close()
    await asked.close()


def signals(found: Measured) -> dict[str, Signal]:
    told = {
        name: getattr(part, name)
        for part in (found.traffic, found.engines)
        for name in part.__dataclass_fields__
    }
    return {name: signal for name, signal in told.items() if isinstance(signal, Signal)}


def differences(direct: Measured, asked: Measured) -> dict[str, tuple[float | None, float | None]]:
    """Return the figures that are not the same, or that one of the two does not know."""
    one, other = signals(direct), signals(asked)
    return {
        name: (one[name].value, other[name].value)
        for name in one
        if other[name].value is None or one[name].value != pytest.approx(other[name].value, ALIKE)
    }


async def test_prometheus_by_the_charts_pod_monitors_answers_what_a_direct_scrape_does(
    exporters: Exporters, sources: tuple[ScrapeSource, PrometheusSource]
) -> None:
    direct, asked = sources
    addresses = tuple(map(exporters.address, exporters.runtimes))
    target = replace(TARGET, addresses=addresses)
    deadline = time.monotonic() + 500
    while True:
        exporters.story.go_on()
        await asyncio.sleep(1)
        one = (await direct.collect([target]))[NAME]
        other = (await asked.collect([target]))[NAME]
        different = differences(one, other)
        if not different:
            break
        assert time.monotonic() < deadline, different
    assert not one.engines.is_unscraped
    assert not other.engines.is_unscraped
    assert other.engines.running.value == 6  # of both replicas
    assert other.traffic.in_flight.value == 6
