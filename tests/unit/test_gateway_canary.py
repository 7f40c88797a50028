"""A canary gets its share of the requests to one, and what becomes of them is counted apart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from prometheus_client import generate_latest

from mizzen.operator.metrics.figures import Target
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.operator.planning.canary import Answers
from mizzen.runtime.gateway.canary import CanaryTurns
from mizzen.runtime.gateway.directory import Canary, Endpoint
from mizzen.runtime.gateway.sinks import parse_model
from tests.fixtures.gateway_house import MODEL, House, MakeHouse, open_houses


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def tried(weight: int) -> Canary:
    return Canary("new", "old", weight)


def serve(house: House, weight: int) -> None:
    """Let the first replica be the canary, the others of the revision before."""
    new, *proven = house.replicas
    house.gateway.directory.put_model(replace(MODEL, canary=tried(weight)))
    house.gateway.directory.put_slice(
        ("team", "tiny-slice"),
        deployment=MODEL.key,
        endpoints=(
            Endpoint(new.url, pod="tiny-new-0-0"),
            *(Endpoint(r.url, pod=f"tiny-old-{n}-0") for n, r in enumerate(proven)),
        ),
    )


def seen(house: House) -> tuple[int, int]:
    """Return how many requests the canary and the others got."""
    new, *proven = house.replicas
    return len(new.seen), sum(len(replica.seen) for replica in proven)


def counted(house: House, revision: str) -> tuple[float, float]:
    """Return the requests and the failures counted of a revision."""
    names = ("requests", "failures")
    requests, failures = (
        house.sample(f"mizzen_gateway_canary_{name}_total", revision=revision) for name in names
    )
    return requests, failures


@pytest.mark.parametrize("weight", [0, 1, 10, 33, 50, 99])
def test_of_any_hundred_requests_in_a_row_exactly_its_share_is_the_canarys(weight: int) -> None:
    turns, model = CanaryTurns(), replace(MODEL, canary=tried(weight))
    taken = [turns.take(model) for _ in range(500)]
    assert {sum(taken[start : start + 100]) for start in range(400)} == {weight}


@pytest.mark.parametrize("weight", [1, 10, 33, 99])
async def test_a_hundred_requests_are_split_to_one(make_house: MakeHouse, weight: int) -> None:
    house = await make_house("good", "good", "good")
    serve(house, weight)
    for number in range(100):
        # Conversations have a replica of their own, but no revision.
        await house.turn(f"question {number % 7}")
    assert seen(house) == (weight, 100 - weight)
    assert counted(house, "new") == (weight, 0)
    assert counted(house, "old") == (100 - weight, 0)


async def test_a_canary_with_no_share_gets_nothing_while_another_replica_is_there(
    make_house: MakeHouse,
) -> None:
    house = await make_house("good", "good")
    serve(house, 0)
    for _ in range(10):
        await house.ask()
    assert seen(house) == (0, 10)
    endpoint = Endpoint(house.replicas[0].url, pod="tiny-new-0-0")
    house.gateway.directory.put_slice(
        ("team", "tiny-slice"), deployment=MODEL.key, endpoints=(endpoint,)
    )
    assert (await house.ask())[0] == 200
    assert seen(house) == (1, 10)


async def test_what_the_canary_fails_is_answered_by_the_others_and_counted_against_it(
    make_house: MakeHouse,
) -> None:
    house = await make_house("die_silent", "good")
    serve(house, 50)
    answers = [(await house.ask())[0] for _ in range(20)]
    assert answers == [200] * 20
    assert counted(house, "new") == (10, 10)
    assert counted(house, "old") == (20, 0)


async def test_a_busy_replica_does_not_push_more_than_its_share_to_the_canary(
    make_house: MakeHouse,
) -> None:
    house = await make_house("good", "busy", queue_timeout_s=0.2)
    serve(house, 10)
    statuses = [(await house.ask())[0] for _ in range(10)]
    assert sorted(statuses) == [200] + [429] * 9
    assert len(house.replicas[0].seen) == 1
    assert counted(house, "old") == (0, 0)  # refused unread: nobody's failure


@pytest.mark.parametrize(
    ("act", "failures"),
    [("crashed", 1), ("not_here", 0), ("die_mid_stream", 1), ("good", 0)],
)
async def test_an_error_of_the_replicas_own_is_its_failure(
    make_house: MakeHouse, act: str, failures: int
) -> None:
    house = await make_house(act, "good")
    serve(house, 99)
    await house.ask()  # of a hundred the first one is the others'
    async with house.client.post(
        f"{house.url}/v1/chat/completions", json={"model": "tiny", "stream": True}
    ) as answer:
        await answer.read()
    assert counted(house, "new") == (1, failures)


async def test_the_series_go_with_the_canary_and_a_new_one_begins_at_zero(
    make_house: MakeHouse,
) -> None:
    house = await make_house("good", "good")
    serve(house, 50)
    for _ in range(4):
        await house.ask()
    assert counted(house, "new") == (2, 0)
    house.gateway.directory.put_model(MODEL)
    await house.ask()
    exposed = generate_latest(house.gateway.metrics.registry).decode()
    assert "mizzen_gateway_canary_requests_total{" not in exposed
    serve(house, 50)
    for _ in range(4):
        await house.ask()
    assert counted(house, "new") == (2, 0)


async def test_the_operator_reads_what_the_gateway_counted(make_house: MakeHouse) -> None:
    house = await make_house("crashed", "good")
    serve(house, 33)
    for _ in range(100):
        await house.ask()

    async def gateways() -> list[str]:
        return [f"127.0.0.1:{house.gateway.metrics_port}"]

    source = ScrapeSource(gateways)
    try:
        found = (await source.collect([Target(name=MODEL.key, settled=0)]))[MODEL.key].answers
    finally:
        await source.close()
    assert found is not None
    assert (found["new"].requests, found["new"].failures) == (33, 33)
    assert (found["old"].requests, found["old"].failures) == (67, 0)
    assert found["new"].ttft_p90_s is None
    assert 0 < (found["old"].ttft_p90_s or 0) < 60
    assert isinstance(found["old"], Answers)


STATUSES = {
    "no rollout": ({}, None),
    "a plain rollout": ({"revision": "new", "stable": "old"}, None),
    "a canary": ({"revision": "new", "stable": "old", "canary": {"weight": 10}}, tried(10)),
    "a failed one": ({"revision": "new", "stable": "old", "failure": {"reason": "x"}}, tried(0)),
    "nothing to compare with": ({"revision": "new", "canary": {"weight": 10}}, None),
    "a strange weight": ({"revision": "new", "stable": "old", "canary": {"weight": "x"}}, None),
}


@pytest.mark.parametrize(("rollout", "expected"), STATUSES.values(), ids=STATUSES)
def test_a_canary_is_read_from_the_status(
    rollout: dict[str, object], expected: Canary | None
) -> None:
    metadata = {"namespace": "team", "name": "tiny"}
    model = parse_model({"metadata": metadata, "status": {"rollout": rollout}})
    assert model.canary == expected


def test_a_deployment_whose_name_begins_like_another_has_its_own_canary() -> None:
    model = replace(MODEL, canary=tried(10))
    assert model.is_canary(Endpoint("http://x", pod="tiny-new-0-0"))
    assert not model.is_canary(Endpoint("http://x", pod="tiny-old-0-0"))
    assert not model.is_canary(Endpoint("http://x"))
