"""Scores for trainers: what replicas have idle moments for, and nobody is to scale or wait for."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from mizzen.runtime.gateway.directory import Endpoint
from tests.fixtures.gateway_house import MODEL, MakeHouse, open_houses, until

SCORE = {"max_tokens": 0, "prompt_logprobs": 0}


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


async def test_a_score_is_answered_and_counted_as_no_arrival(make_house: MakeHouse) -> None:
    house = await make_house([])
    assert (await house.ask(**SCORE))[0] == 200
    assert house.sample("mizzen_gateway_arrivals_total") == 0
    assert (await house.ask(max_tokens=1))[0] == 200
    assert house.sample("mizzen_gateway_arrivals_total") == 1


async def test_a_replica_without_an_idle_moment_goes_on_with_those_who_ask_for_text(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["busy"])
    status, body, headers = await house.ask(**SCORE)
    assert (status, headers["Retry-After"]) == (429, "7")
    assert body["error"]["message"] == "queue is full"
    # Had the refusal been taken for want of room, this one would wait for seven seconds.
    (endpoint,) = (Endpoint(replica.url, pod="pod") for replica in house.replicas)
    assert house.gateway.balancer.choose((endpoint,), key=None, without=set()) is not None
    assert (await house.ask())[0] == 200


async def test_another_replica_may_have_one(make_house: MakeHouse) -> None:
    house = await make_house(["busy"], [])
    answers = [await house.ask(**SCORE) for _ in range(2)]
    assert [status for status, _, _ in answers] == [200, 200]


async def test_no_model_is_woken_for_a_score(make_house: MakeHouse) -> None:
    house = await make_house([], hold_timeout_s=60)
    house.serve(model=replace(MODEL, scales=True))
    status, body, headers = await house.ask(**SCORE)
    assert status == 503
    assert "has no ready replica now" in body["error"]["message"]
    assert int(headers["Retry-After"]) > 0
    assert house.gateway.admission.room.held(MODEL.key) == 0
    await until(lambda: house.sample("mizzen_gateway_in_flight_requests") == 0)
