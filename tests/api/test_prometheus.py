"""Every PromQL against a real Prometheus that holds what the real exporters said."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from hack.prometheus import PrometheusServer
from mizzen.operator.metrics.figures import UNKNOWN, Measured
from mizzen.operator.metrics.prometheus import PrometheusSource
from mizzen.operator.planning.scale import History, Why, decide
from mizzen.operator.planning.scale_rules import ScaleRules, Targets
from mizzen.operator.planning.signals import Observation, ReplicaState
from tests.fixtures.metrics_story import LENGTH_S, NAME, OTHER, QUIET, STEP_S, TARGET, Story, check

_AHEAD_S = 600  # so much of the story lies after the server's start
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)")


def with_labels(line: str, labels: dict[str, str], at: int) -> str | None:
    """Return a sample as a scrape stores it: with the target's labels and a time."""
    match = _SAMPLE.match(line)
    if match is None:
        return None
    name, own, value = match.groups()
    inside = [own[1:-1].rstrip(",")] if own and own != "{}" else []
    inside += [f'{key}="{text}"' for key, text in labels.items()]
    return f"{name}{{{','.join(inside)}}} {value} {at}"


def recorded(until: int) -> str:
    """Return the story as OpenMetrics text with times, ending some time after `until`."""
    story, lines = Story(), []
    begin = until - LENGTH_S
    for index, at in enumerate(range(begin, until + _AHEAD_S, STEP_S)):
        story.go_on(restart=index == 36)
        for name, text in ((name, story.text(name)) for name in story.names):
            labels = {"pod": name}
            if name != "gateway":
                labels |= {"namespace": NAME[0], "mizzen_dev_deployment": NAME[1]}
            found = (with_labels(line, labels, at) for line in text.splitlines())
            lines += [line for line in found if line]
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def server(prometheus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "story.txt").write_text(recorded(int(time.time())))
    subprocess.run(
        [
            *(str(prometheus.parent / "promtool"), "tsdb", "create-blocks-from", "openmetrics"),
            *(str(folder / "story.txt"), str(folder / "data")),
        ],
        check=True,
        capture_output=True,
    )
    with PrometheusServer(prometheus, folder, {"global": {}}) as url:
        yield url


async def test_every_figure_is_the_same_as_by_direct_scrape(server: str) -> None:
    source = PrometheusSource(server, scrape_s=STEP_S)
    found = await source.collect([TARGET, QUIET])
    await source.close()
    check(found[NAME], pytest.approx)  # the same figures as tests/unit/test_metrics_scrape.py
    assert found[NAME].engines.running.age_s <= 15
    assert found[OTHER].traffic.arrivals_per_s.value == 0.0
    assert found[OTHER].engines.running == UNKNOWN


async def test_a_replica_missing_among_the_series_makes_the_sums_unknown(server: str) -> None:
    source = PrometheusSource(server, scrape_s=STEP_S)
    three = type(TARGET)(name=NAME, settled=3)
    found = (await source.collect([three]))[NAME]
    await source.close()
    assert found.engines.running == UNKNOWN
    assert found.traffic.arrivals_per_s.value is not None


async def test_a_deployment_no_gateway_knows_is_unknown(server: str) -> None:
    source = PrometheusSource(server, scrape_s=STEP_S)
    stranger = type(TARGET)(name=("team", "stranger"), settled=0)
    found = (await source.collect([stranger]))["team", "stranger"]
    await source.close()
    assert found.traffic.arrivals_per_s == UNKNOWN


async def test_a_deployment_whose_first_replica_was_not_scraped_yet_is_told_from_a_lost_one(
    server: str,
) -> None:
    source = PrometheusSource(server, scrape_s=STEP_S)
    new = (await source.collect([QUIET]))[OTHER]
    lost = (await source.collect([replace(QUIET, settled=1)]))[OTHER]
    scraped = (await source.collect([replace(TARGET, settled=0)]))[NAME]
    await source.close()
    assert decided(new) == (1, Why.AWAITING_SCRAPE)
    assert decided(lost) == (1, Why.SIGNALS_UNKNOWN)
    assert not scraped.engines.is_unscraped


def decided(
    found: Measured, *, desired: int = 1, least: int = 0, age_s: float = 5
) -> tuple[int, Why]:
    """Return what becomes of the number of replicas with these figures."""
    seen = Observation(
        now_s=1000.0,
        replicas=(ReplicaState(name="r", age_s=age_s, is_ready=True),),
        traffic=found.traffic,
        engines=found.engines,
    )
    rules = ScaleRules(min_replicas=least, max_replicas=9, targets=Targets(concurrency=4))
    decision = decide(History(desired=desired), seen, rules)
    return decision.replicas, decision.reason


@pytest.mark.parametrize("settled", [0, 2])
async def test_a_server_that_is_down_makes_everything_unknown_and_nothing_smaller(
    settled: int,
) -> None:
    source = PrometheusSource("http://127.0.0.1:9", scrape_s=STEP_S)
    found = (await source.collect([replace(TARGET, settled=settled)]))[NAME]
    await source.close()
    assert decided(found, desired=5, least=1, age_s=500) == (5, Why.SIGNALS_UNKNOWN)


ANSWERS = {
    "no number": '{"data": {"result": [{"metric": {"namespace": "team", "model": "smollm2", '
    '"mizzen_dev_deployment": "smollm2"}, "value": [1, "NaN"]}]}}',
    "an error": '{"status": "error", "errorType": "execution", "error": "too many samples"}',
    "no JSON": "<html>bad gateway</html>",
    "no rows": '{"data": {"result": []}}',
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("settled", [0, 2])
async def test_answers_that_are_no_figures_are_unknown(answer: str, settled: int) -> None:
    async def query(_: web.Request) -> web.Response:
        return web.Response(text=answer, content_type="application/json")

    app = web.Application()
    app.router.add_post("/api/v1/query", query)
    fake = TestServer(app)
    await fake.start_server()
    source = PrometheusSource(str(fake.make_url("")), scrape_s=STEP_S)
    found = (await source.collect([replace(TARGET, settled=settled)]))[NAME]
    await source.close()
    await fake.close()
    assert found.engines.running.fresh(15) is None
    assert found.traffic.arrivals_per_s.fresh(15) is None
    assert decided(found) == (1, Why.SIGNALS_UNKNOWN)


@pytest.mark.parametrize("metric", ["mizzen_gateway_arrivals_total", "mizzen_gateway_canary_"])
async def test_a_figure_that_prometheus_fails_to_answer_is_unknown_and_not_zero(
    metric: str,
) -> None:
    labels = {
        **{"namespace": "team", "model": "smollm2", "mizzen_dev_deployment": "smollm2"},
        **{"revision": "new", "le": "1"},
    }
    rows = {"data": {"result": [{"metric": labels, "value": [1, "2"]}]}}

    async def query(request: web.Request) -> web.Response:
        if metric in str((await request.post())["query"]):
            return web.json_response({"status": "error", "errorType": "timeout"}, status=503)
        return web.json_response(rows)

    app = web.Application()
    app.router.add_post("/api/v1/query", query)
    fake = TestServer(app)
    await fake.start_server()
    source = PrometheusSource(str(fake.make_url("")), scrape_s=STEP_S)
    found = (await source.collect([TARGET]))[NAME]
    await source.close()
    await fake.close()
    assert found.traffic.arrivals_per_s == UNKNOWN
    assert found.answers is None
    assert found.engines.waiting.value == 2.0


async def test_a_count_of_replicas_that_prometheus_fails_to_answer_is_not_a_count_of_none() -> None:
    labels = {"namespace": "team", "model": "smollm2", "revision": "new", "le": "1"}
    rows = {"data": {"result": [{"metric": labels, "value": [1, "2"]}]}}

    async def query(request: web.Request) -> web.Response:
        if str((await request.post())["query"]).startswith("count by"):
            return web.json_response({"status": "error", "errorType": "timeout"}, status=503)
        return web.json_response(rows)

    app = web.Application()
    app.router.add_post("/api/v1/query", query)
    fake = TestServer(app)
    await fake.start_server()
    source = PrometheusSource(str(fake.make_url("")), scrape_s=STEP_S)
    found = (await source.collect([replace(TARGET, settled=0)]))[NAME]
    await source.close()
    await fake.close()
    assert found.traffic.arrivals_per_s.value == 2.0
    assert decided(found) == (1, Why.SIGNALS_UNKNOWN)
