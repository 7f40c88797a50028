"""An adapter on trial: counted apart by the gateway, judged beside its neighbours, taken back."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import generate_latest

from mizzen.operator.metrics.figures import Target
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.operator.planning.canary import Answers
from mizzen.operator.planning.trial import Decision, Sides, TrialRules, Verdict, decide_trial
from mizzen.runtime.gateway.directory import Canary, Endpoint
from mizzen.runtime.gateway.sinks import parse_model
from tests.fixtures.gateway_house import MODEL, House, MakeHouse, open_houses, until
from tests.fixtures.serving_world import World, publish_job
from tests.unit.test_llmdeployment_canary import answers
from tests.unit.test_promotions import promoted, reconcile_job

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
RULES = TrialRules(hold_s=60, error_ratio=0.1, ttft_factor=2, min_requests=10)
BAD = ("bad", "sha256:2")

OUTCOMES = {
    "it is watched for as long as the job says": (
        59, Sides(answers(50), answers(50)), Verdict.WATCH, "watched for 60 seconds"),
    "it is kept when it fares as the others do": (
        60, Sides(answers(50, 2), answers(50, 2)), Verdict.KEEP, ""),
    "it is kept when nobody asked for it": (60, Sides(), Verdict.KEEP, ""),
    "nothing is promoted while the gateways tell nothing": (
        9999, None, Verdict.WATCH, "The gateways do not tell"),
    "too few requests do not judge it": (
        1, Sides(answers(9, 9), answers(50)), Verdict.WATCH, "watched"),
    "failures of its own take it back at once": (
        1, Sides(answers(40, 8), answers(360, 2)), Verdict.TAKE_BACK,
        "8 of its 40 requests failed and 2 of the deployment's 360 others; errorRatio allows "
        "0.1 more."),
    "failures that all requests have are not its own": (
        1, Sides(answers(40, 8), answers(360, 72)), Verdict.WATCH, "watched"),
    "answers that begin late take it back": (
        1, Sides(answers(40, p90_s=0.5), answers(360)), Verdict.TAKE_BACK,
        "TTFT p90 is 0.5 s and that of the deployment's other requests 0.1 s; ttftFactor allows 2"),
    "a deployment that is slow for all does not": (
        1, Sides(answers(40, p90_s=0.5), answers(360, p90_s=0.5)), Verdict.WATCH, "watched"),
}  # fmt: skip


@pytest.mark.parametrize(("age_s", "sides", "verdict", "why"), OUTCOMES.values(), ids=OUTCOMES)
def test_decide_trial(age_s: int, sides: Sides | None, verdict: Verdict, why: str) -> None:
    decision = decide_trial(SINCE, sides, RULES, now=SINCE + timedelta(seconds=age_s))
    assert decision.verdict is verdict
    assert why in decision.why


def test_what_is_not_named_is_not_looked_at() -> None:
    rules = TrialRules(hold_s=60, error_ratio=0.1)
    slow = Sides(answers(40, p90_s=9), answers(360))
    assert decide_trial(SINCE, slow, rules, now=SINCE + timedelta(hours=1)) == Decision(
        Verdict.KEEP
    )


# At the gateway.


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def try_adapter(house: House, *, canary: Canary | None = None) -> None:
    """Serve an adapter on trial on every replica; the first is a canary's where there is one."""
    house.gateway.directory.put_model(replace(MODEL, trials=(BAD,), canary=canary))
    house.gateway.directory.put_slice(
        ("team", "tiny-slice"),
        deployment=MODEL.key,
        endpoints=tuple(
            Endpoint(replica.url, pod=f"tiny-{'old' if number else 'new'}-{number}-0")
            for number, replica in enumerate(house.replicas)
        ),
    )


def counted(house: House, side: str) -> tuple[float, float]:
    labels = {"adapter": BAD[0], "digest": BAD[1], "side": side}
    requests, failures = (
        house.sample(f"mizzen_gateway_trial_{name}_total", **labels)
        for name in ("requests", "failures")
    )
    return requests, failures


async def ask(house: House, count: int) -> None:
    """Ask the adapter, another one and the base model so many times each."""
    for _ in range(count):
        for name in ("tiny:bad", "tiny:good", "tiny"):
            await house.ask(model=name)


async def test_a_bad_adapter_is_counted_apart_from_all_beside_it(make_house: MakeHouse) -> None:
    house = await make_house("bad_adapter", "bad_adapter")
    try_adapter(house)
    await ask(house, 8)
    assert counted(house, "own") == (8, 8)
    assert counted(house, "others") == (16, 0)


async def test_an_answer_that_breaks_off_with_an_error_is_a_failure(make_house: MakeHouse) -> None:
    house = await make_house("fails_mid_stream")
    try_adapter(house)
    async with house.client.post(
        f"{house.url}/v1/chat/completions", json={"model": "tiny:bad", "stream": True}
    ) as answer:
        assert b'"error"' in await answer.read()
    await until(lambda: counted(house, "own") == (1, 1))
    assert house.sample("mizzen_gateway_cut_streams_total") == 1


async def test_a_bad_adapter_costs_neither_replicas_nor_a_canary_of_the_deployment(
    make_house: MakeHouse,
) -> None:
    house = await make_house("bad_adapter", "bad_adapter")
    try_adapter(house, canary=Canary("new", "old", 50))
    for _ in range(40):
        assert (await house.ask(model="tiny:bad"))[0] == 500
    urls = [replica.url for replica in house.replicas]
    assert not house.gateway.balancer.outliers.ejected(urls)
    for _ in range(10):
        assert (await house.ask())[0] == 200
    canary = [
        house.sample(f"mizzen_gateway_canary_{name}_total", revision=revision)
        for revision in ("new", "old")
        for name in ("requests", "failures")
    ]
    assert canary == [5, 0, 5, 0]
    assert counted(house, "own") == (40, 40)


async def test_the_operator_reads_the_trial_and_would_take_the_adapter_back(
    make_house: MakeHouse,
) -> None:
    house = await make_house("bad_adapter")
    try_adapter(house)
    await ask(house, 10)

    async def gateways() -> list[str]:
        return [f"127.0.0.1:{house.gateway.metrics_port}"]

    source = ScrapeSource(gateways)
    try:
        found = (await source.collect([Target(name=MODEL.key, settled=0)]))[MODEL.key].trials
    finally:
        await source.close()
    assert found is not None
    assert decide_trial(SINCE, found[BAD], RULES, now=SINCE).why.startswith(
        "10 of its 10 requests failed and 0 of the deployment's 20 others"
    )


async def test_a_new_version_begins_at_zero_and_series_end_with_the_trial(
    make_house: MakeHouse,
) -> None:
    house = await make_house("good")
    try_adapter(house)
    await ask(house, 2)
    house.gateway.directory.put_model(replace(MODEL, trials=(("bad", "sha256:3"),)))
    await ask(house, 1)
    exposed = generate_latest(house.gateway.metrics.registry).decode()
    assert 'digest="sha256:3",model="tiny",namespace="team",side="own"} 1.0' in exposed
    assert "sha256:2" not in exposed
    house.gateway.directory.put_model(MODEL)
    await ask(house, 1)
    assert "mizzen_gateway_trial_requests_total{" not in (
        generate_latest(house.gateway.metrics.registry).decode()
    )


async def test_names_that_clients_make_up_are_no_labels(make_house: MakeHouse) -> None:
    house = await make_house("good")
    try_adapter(house)
    await house.ask(model="tiny:invented")
    assert counted(house, "others") == (1, 0)
    assert "invented" not in generate_latest(house.gateway.metrics.registry).decode()


def test_trials_are_read_from_the_status() -> None:
    listed = [
        {"name": "bad", "digest": "sha256:2", "onTrial": True},
        {"name": "good", "digest": "sha256:1"},
        {"digest": "sha256:1", "onTrial": True},
    ]
    metadata = {"namespace": "team", "name": "tiny"}
    model = parse_model({"metadata": metadata, "status": {"adapters": listed}})
    assert model.trials == (BAD,)


# By the controllers.

TRIAL = {"holdSeconds": 60, "errorRatio": 0.1}


async def served_on_trial() -> World:
    """A name that moved on to a second job, whose adapter is on trial."""
    world = World()
    publish_job(world, "one", digest="sha256:1", adapter="support")
    await world.settle()
    assert promoted(await reconcile_job(world, "one")) == ("Succeeded", "True", "Promoted")
    publish_job(
        world, "two", digest="sha256:2", at="2026-01-01T01:00:00Z",
        adapter="support", replaces="one", trial=TRIAL,
    )  # fmt: skip
    await world.settle()
    assert promoted(await reconcile_job(world, "two")) == ("Promoting", "False", "Promoting")
    await world.settle()
    return world


def tell(world: World, own: Answers, others: Answers) -> None:
    world.metrics.trials = {("support", "sha256:2"): Sides(own, others)}


async def test_a_bad_adapter_is_taken_back_and_the_deployment_is_not() -> None:
    world = await served_on_trial()
    (adapter,) = world.status["adapters"]
    assert adapter["onTrial"] is True
    tell(world, answers(40, 30), answers(400))
    pods, ready = copy.deepcopy(world.pods), world.condition("Ready")
    failed = await reconcile_job(world, "two")
    assert promoted(failed) == ("Failed", "False", "RolledBack")
    (why,) = [c["message"] for c in failed["conditions"] if c["type"] == "Failed"]
    assert "30 of its 40 requests failed and 0 of the deployment's 400 others" in why
    assert why.endswith("and submit a new job.")
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:1"}]
    (adapter,) = world.status["adapters"]
    assert (adapter["job"], adapter.get("onTrial")) == ("one", None)
    assert [pod["metadata"]["uid"] for pod in world.pods] == [p["metadata"]["uid"] for p in pods]
    assert world.condition("Ready") == ready
    assert promoted(await reconcile_job(world, "one")) == ("Succeeded", "True", "Promoted")


async def test_a_good_adapter_is_promoted_after_its_trial_and_watched_no_more() -> None:
    world = await served_on_trial()
    tell(world, answers(40), answers(400))
    world.now += timedelta(seconds=30)
    world.restart_operator()
    on_trial = await reconcile_job(world, "two")
    assert promoted(on_trial) == ("Promoting", "False", "Promoting")
    (why,) = [c["message"] for c in on_trial["conditions"] if c["type"] == "Promoted"]
    assert why == (
        "smollm2:support serves the result on trial. Its requests are watched for 60 seconds."
    )
    world.now += timedelta(seconds=31)
    done = await reconcile_job(world, "two")
    assert promoted(done) == ("Succeeded", "True", "Promoted")
    assert "onTrialSince" not in done["promotion"]
    await world.settle()
    assert "onTrial" not in world.status["adapters"][0]
    tell(world, answers(40, 40), answers(400))
    assert promoted(await reconcile_job(world, "two")) == ("Succeeded", "True", "Promoted")


async def test_a_trial_waits_while_the_gateways_tell_nothing() -> None:
    world = await served_on_trial()
    world.now += timedelta(hours=1)
    waiting = await reconcile_job(world, "two")
    assert promoted(waiting) == ("Promoting", "False", "Promoting")
    tell(world, answers(40), answers(400))
    world.metrics.age_s = 1e6
    assert await reconcile_job(world, "two") == waiting
    world.metrics.age_s = 0
    assert promoted(await reconcile_job(world, "two")) == ("Succeeded", "True", "Promoted")


async def test_probes_come_before_the_trial_and_are_not_asked_again() -> None:
    world = World()
    probes = [{"prompt": "The capital of France is", "expect": "Paris"}]
    publish_job(world, "two", digest="sha256:2", adapter="support", trial=TRIAL, probes=probes)
    await world.settle()
    world.runtimes.answer = " Paris"
    await reconcile_job(world, "two")
    asked = list(world.runtimes.prompted)
    assert len(asked) == 1
    on_trial = await reconcile_job(world, "two")
    assert "onTrialSince" in on_trial["promotion"]
    assert world.runtimes.prompted == asked
