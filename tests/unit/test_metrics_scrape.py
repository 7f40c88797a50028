"""The load read from the processes themselves, and what cannot be read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from mizzen.operator.metrics.figures import (
    CANARY_REQUESTS,
    FIRST_BYTES,
    KNOWN,
    RUNNING,
    TTFT,
    UNKNOWN,
    Measured,
    Raw,
    Target,
    measured,
    share_within,
)
from mizzen.operator.metrics.scrape import Process, ScrapeSource, parse
from mizzen.operator.planning.scale_rules import Slo
from tests.fixtures.metrics_story import NAME, OTHER, QUIET, STEP_S, TARGET, Story, check


class World:
    """The story's processes behind real HTTP servers, and a source that scrapes them."""

    def __init__(self) -> None:
        self.story = Story()
        self.now = 0.0
        self.silent: set[str] = set()
        self.servers: dict[str, TestServer] = {}
        self.has_gateway = True

    async def start(self) -> None:
        for name in self.story.names:
            app = web.Application()
            app.router.add_get("/metrics", self._serve(name))
            self.servers[name] = TestServer(app)
            await self.servers[name].start_server()
        self.source = ScrapeSource(self._gateways, clock=lambda: self.now)

    def _serve(self, name: str):  # type: ignore[no-untyped-def]
        async def answer(_: web.Request) -> web.Response:
            if name in self.silent:
                return web.Response(status=503)
            return web.Response(text=self.story.text(name))

        return answer

    async def _gateways(self) -> Sequence[str] | None:
        return [self.address("gateway")] if self.has_gateway else []

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.servers[name].port}"

    @property
    def targets(self) -> list[Target]:
        addresses = tuple(self.address(name) for name in self.servers if name != "gateway")
        return [replace(TARGET, addresses=addresses), QUIET]

    async def run(self, seconds: int, *, restart_at: int = -1) -> dict[tuple[str, str], Measured]:
        for second in range(0, seconds, STEP_S):
            self.story.go_on(restart=second == restart_at)
            self.now += STEP_S
            found = await self.source.collect(self.targets)
        return dict(found)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.start()
    yield made
    await made.source.close()
    for server in made.servers.values():
        await server.close()


async def test_every_figure_is_read_from_the_real_exporters(world: World) -> None:
    found = await world.run(120, restart_at=50)
    check(found[NAME], pytest.approx)


async def test_a_deployment_nobody_asks_has_zero_arrivals_not_unknown_ones(world: World) -> None:
    found = await world.run(15)
    assert found[OTHER].traffic.arrivals_per_s.value == 0.0
    assert found[OTHER].traffic.held.value == 0.0
    assert found[OTHER].engines.running == UNKNOWN


async def test_a_process_that_stops_answering_makes_its_figures_old(world: World) -> None:
    await world.run(30)
    world.silent = {"runtime-1"}
    found = (await world.run(20))[NAME]
    assert found.engines.running.age_s == 20
    assert found.engines.running.fresh(15) is None
    assert found.traffic.arrivals_per_s.age_s == 0


async def test_a_settled_replica_that_was_never_read_makes_the_sums_unknown(world: World) -> None:
    world.silent = {"runtime-1"}
    found = (await world.run(30))[NAME]
    assert found.engines.running == UNKNOWN
    world.silent = {"gateway"}
    fresh = (await world.run(30))[NAME]
    assert fresh.traffic.arrivals_per_s.fresh(15) is None


async def test_new_replicas_that_did_not_answer_yet_are_unscraped_until_one_does(
    world: World,
) -> None:
    world.silent = {"runtime-0", "runtime-1"}
    await world.run(15)
    for settled, is_unscraped in ((0, True), (1, False)):
        (target,) = (replace(t, settled=settled) for t in world.targets if t.name == NAME)
        found = (await world.source.collect([target]))[NAME]
        assert found.engines.running == UNKNOWN
        assert found.engines.is_unscraped is is_unscraped
    world.silent = set()
    assert not (await world.source.collect([replace(target, settled=0)]))[NAME].engines.is_unscraped


async def test_a_look_at_one_deployment_forgets_nothing_of_the_others(world: World) -> None:
    found = await world.run(60)
    assert found[NAME].engines.steps_per_s.value
    await world.source.collect([QUIET])
    again = await world.run(STEP_S)
    assert again[NAME].engines.steps_per_s.value == pytest.approx(
        found[NAME].engines.steps_per_s.value
    )


async def test_a_process_nobody_asks_for_is_forgotten_after_the_longest_window(
    world: World,
) -> None:
    await world.run(60)
    world.now += 301
    await world.source.collect([QUIET])
    again = await world.run(STEP_S)
    assert again[NAME].engines.steps_per_s == UNKNOWN


async def test_without_a_gateway_arrivals_are_unknown(world: World) -> None:
    world.has_gateway = False
    found = (await world.run(15))[NAME]
    assert found.traffic.arrivals_per_s == UNKNOWN
    assert found.traffic.in_flight == UNKNOWN


def test_a_counter_that_fell_began_at_zero() -> None:
    process = Process()
    series = ("vllm:prompt_tokens_total", ())
    for at, value in enumerate([100.0, 110.0, 4.0, 14.0]):
        process.take(float(at), {series: value})
    assert process.rate(series, 30.0) == pytest.approx((10 + 4 + 10) / 3)


def test_only_wanted_series_are_parsed_and_broken_text_is_an_error() -> None:
    text = 'other_metric{a="b"} 1\nvllm:num_requests_running{model_name="m"} 3\n'
    assert parse(text) == {("vllm:num_requests_running", ()): 3.0}
    with pytest.raises(ValueError):
        parse("vllm:num_requests_running{model_name= 3\n")


SHARES: dict[str, tuple[float | None, float | None]] = {
    "at an edge": (0.2, 0.5),
    "between two edges": (0.3, 0.625),
    "above the last edge but infinity": (5.0, 0.75),
    "no promise": (None, None),
}


@pytest.mark.parametrize(("limit", "expected"), SHARES.values(), ids=SHARES)
def test_the_share_within_a_limit(limit: float | None, expected: float | None) -> None:
    buckets = {("0.2",): 2.0, ("0.4",): 3.0, ("+Inf",): 4.0}
    assert share_within(buckets, limit) == expected


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_no_finite_number_is_unknown_as_with_prometheus(value: float) -> None:
    raw = Raw({(RUNNING, ()): value, (TTFT, ("1",)): value}, runtime_age_s=0.0, reporting=2)
    found = measured(raw, TARGET)
    assert found.engines.running == UNKNOWN
    assert found.traffic.ttft_ok_ratio == UNKNOWN


def test_a_histogram_without_observations_has_no_share() -> None:
    assert share_within({("0.2",): 0.0, ("+Inf",): 0.0}, 0.1) is None
    assert share_within({}, 0.1) is None


@pytest.mark.parametrize("edge", ["", "many", "nan"])
def test_a_foreign_series_that_is_no_bucket_is_left_out(edge: str) -> None:
    values = {
        (KNOWN, ()): 1.0,
        (CANARY_REQUESTS, ("new",)): 4.0,
        (FIRST_BYTES, ("new", "0.5")): 3.0,
        (FIRST_BYTES, ("new", edge)): 9.0,
        (TTFT, ("0.5",)): 3.0,
        (TTFT, ("+Inf",)): 4.0,
        (TTFT, (edge,)): 9.0,
    }
    raw = Raw(values, gateway_age_s=0.0, runtime_age_s=0.0, reporting=2)
    found = measured(raw, replace(TARGET, slo=Slo(ttft_s=0.5)))
    assert found.answers is not None
    assert found.answers["new"].first_bytes == {0.5: 3.0}
    assert found.traffic.ttft_ok_ratio.value == 0.75
