"""Requests that wait: for a model at zero, and for room on replicas that are all busy."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import ClientError
from hypothesis import given
from hypothesis import strategies as st

from mizzen.runtime.gateway.directory import Directory, Endpoint, EndpointState
from mizzen.runtime.gateway.fairness import FairOrder
from mizzen.runtime.gateway.kube import KubeError, KubeObject
from mizzen.runtime.gateway.sinks import parse_model
from mizzen.runtime.gateway.wake import Waker, wake_value
from tests.fixtures.clock import Clock
from tests.fixtures.gateway_house import (
    CHAT,
    MODEL,
    TOKENS,
    House,
    MakeHouse,
    open_houses,
    until,
)

SCALING = replace(MODEL, scales=True)


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


class Patches:
    """An API server that takes merge patches, or fails."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.seen: list[tuple[str, str]] = []

    async def merge(self, path: str, patch: KubeObject) -> None:
        self.seen.append((path, patch["metadata"]["annotations"]["mizzen.dev/wake"]))
        if self.failures:
            raise self.failures.pop(0)


def held(house: House) -> int:
    return house.gateway.admission.room.held(MODEL.key)


async def test_requests_are_held_until_a_replica_is_ready_and_one_annotation_wakes_it(
    make_house: MakeHouse,
) -> None:
    house = await make_house([], hold_timeout_s=60)
    patches = Patches()
    house.gateway.admission.waker = Waker(patches, clock=Clock())
    house.serve(model=SCALING)
    asking = [asyncio.create_task(house.ask()) for _ in range(20)]
    await until(lambda: held(house) == 20 and patches.seen)
    assert house.sample("mizzen_gateway_held_requests") == 20
    house.serve(*house.replicas, model=SCALING)
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 20
    assert held(house) == 0
    # However many wait, they are one write: the first, or the first few that came together.
    assert len(patches.seen) == 1
    path, value = patches.seen[0]
    assert path == (
        "/apis/mizzen.dev/v1alpha1/namespaces/team/llmdeployments/tiny?fieldManager=mizzen-gateway"
    )
    at, _, number = value.partition(";held=")
    assert abs((datetime.fromisoformat(at) - datetime.now(UTC)).total_seconds()) < 300
    assert 1 <= int(number) <= 20


async def test_a_model_of_fixed_size_is_waited_for_but_not_woken(make_house: MakeHouse) -> None:
    house = await make_house([], hold_timeout_s=60)
    patches = Patches()
    house.gateway.admission.waker = Waker(patches)
    house.serve()
    asking = asyncio.create_task(house.ask())
    await until(lambda: held(house))
    await asyncio.sleep(0.1)
    house.serve(*house.replicas)
    assert (await asking)[0] == 200
    assert not patches.seen


async def test_a_waiting_stream_is_told_how_it_goes_and_then_gets_its_tokens(
    make_house: MakeHouse,
) -> None:
    house = await make_house([], hold_timeout_s=60, progress_s=0.05)
    house.serve()
    body = {"model": "tiny", "stream": True}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        assert await answer.content.readline() == b": tiny is starting; 1 requests wait\n"
        house.serve(*house.replicas)
        text = await answer.read()
    events = [line for line in text.splitlines() if line and not line.startswith(b":")]
    assert events == [token.strip() for token in TOKENS]


@pytest.mark.parametrize("progress_s", [0.05, 60], ids=["told", "not told"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole answer"])
async def test_a_request_that_has_waited_long_enough_gets_an_error_it_understands(
    make_house: MakeHouse, stream: bool, progress_s: float
) -> None:
    house = await make_house(hold_timeout_s=0.3, progress_s=progress_s)
    body = {"model": "tiny", "stream": stream}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        text = (await answer.read()).decode()
    if stream and progress_s < 1:
        # The status is out; the error is an event, and the stream has no [DONE].
        assert answer.status == 200
        text = text.rsplit("data: ", 1)[1]
    else:
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) >= 1
    error = json.loads(text)["error"]
    assert error["code"] == "model_not_ready"
    assert "has no ready replica now" in error["message"]
    assert held(house) == 0


BOUNDS = {
    "in number": ({"max_waiting": 2}, "2 requests wait already"),
    "in bytes": ({"max_waiting_mib": 1}, "MiB of requests wait already"),
}


@pytest.mark.parametrize(("settings", "says"), BOUNDS.values(), ids=BOUNDS)
async def test_what_is_held_is_bounded(
    make_house: MakeHouse, settings: dict[str, Any], says: str
) -> None:
    house = await make_house([], hold_timeout_s=60, **settings)
    house.serve()
    text = "x" * 500_000
    asking = [asyncio.create_task(house.ask(text=text)) for _ in range(2)]
    await until(lambda: held(house) == 2)
    status, document, headers = await house.ask(text=text)
    assert (status, document["error"]["code"]) == (503, "model_not_ready")
    assert says in document["error"]["message"]
    assert headers["Retry-After"]
    house.serve(*house.replicas)
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [200, 200]


async def test_a_model_that_is_off_or_gone_is_not_waited_for(make_house: MakeHouse) -> None:
    house = await make_house([], hold_timeout_s=60)
    house.serve(model=replace(MODEL, is_off=True))
    status, document, _ = await house.ask()
    assert status == 503
    assert "is switched off (spec.replicas is 0)" in document["error"]["message"]
    house.serve()
    asking = asyncio.create_task(house.ask())
    await until(lambda: held(house))
    house.gateway.directory.drop_model(MODEL.key)
    status, document, _ = await asking
    assert status == 503
    assert "is no longer served" in document["error"]["message"]


async def test_a_client_that_leaves_gives_its_place_up(make_house: MakeHouse) -> None:
    house = await make_house(hold_timeout_s=60)
    asking = asyncio.create_task(house.ask())
    await until(lambda: held(house))
    asking.cancel()
    await until(lambda: not held(house))


async def test_a_request_whose_last_replica_goes_is_held_for_the_next(
    make_house: MakeHouse,
) -> None:
    house = await make_house("draining", [], hold_timeout_s=60, retry_window_s=0.1)
    house.serve(house.replicas[0])
    asking = asyncio.create_task(house.ask())
    await until(lambda: house.replicas[0].seen)
    house.serve()
    await until(lambda: held(house))
    house.serve(house.replicas[1])
    assert (await asking)[1] == {"from": "1"}


# When all replicas are busy.


@pytest.mark.parametrize("act", ["draining", "die_silent"])
async def test_what_the_last_one_on_its_way_out_refuses_is_held_for_the_next(
    make_house: MakeHouse, act: str
) -> None:
    house = await make_house(act, "good", hold_timeout_s=60, retry_window_s=0.1)
    leaving, successor = house.replicas
    endpoint = Endpoint(leaving.url, EndpointState.TERMINATING)
    house.serve()
    house.gateway.directory.put_slice(
        ("team", "tiny-slice"), deployment=MODEL.key, endpoints=(endpoint,)
    )
    asking = [asyncio.create_task(house.ask()) for _ in range(4)]
    await until(lambda: held(house) == 4)
    await asyncio.sleep(1)
    # Who leaves is not asked twice by the same request.
    assert 1 <= len(leaving.seen) <= 4 * (2 if act == "die_silent" else 1)
    house.serve(successor)
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 4


async def test_requests_beyond_a_replicas_room_wait_and_none_is_refused(
    make_house: MakeHouse,
) -> None:
    house = await make_house("stepwise", replica_requests=2, queue_timeout_s=60)
    streams = [asyncio.create_task(house.stream()) for _ in range(6)]
    replica = house.replicas[0]
    await until(lambda: (held(house), len(replica.seen)) == (4, 2))
    replica.may_continue.set()
    assert await asyncio.gather(*streams) == [b"".join(TOKENS)] * 6


async def test_a_refusal_for_want_of_room_is_waited_out(make_house: MakeHouse) -> None:
    house = await make_house(["busy", "busy"], queue_timeout_s=60)
    assert (await house.ask())[0] == 200
    assert len(house.replicas[0].seen) == 3


async def test_room_that_never_comes_is_429(make_house: MakeHouse) -> None:
    house = await make_house("stepwise", replica_requests=1, queue_timeout_s=0.2)
    stream = asyncio.create_task(house.stream())
    await until(lambda: house.replicas[0].seen)
    status, document, headers = await house.ask()
    assert (status, document["error"]["code"]) == (429, "model_busy")
    assert headers["Retry-After"]
    house.replicas[0].may_continue.set()
    await stream


# The order.


def order_of(*asked: tuple[str, int]) -> list[str]:
    """Let these (client, priority) wait together and say in which order they go."""
    order = FairOrder()
    turns = [
        (order.next_turn(client=client, priority=priority, cost=1), client)
        for client, priority in asked
    ]
    served = []
    while turns:
        turns.sort()
        turn, client = turns.pop(0)
        order.on_served(turn)
        served.append(client)
    return served


def test_clients_take_turns_however_many_requests_each_has() -> None:
    asked = [("greedy", 0)] * 100 + [("modest", 0)] * 2
    assert order_of(*asked)[:4] == ["greedy", "modest", "greedy", "modest"]


def test_a_higher_priority_goes_first_and_equals_keep_their_order() -> None:
    assert order_of(("a", 0), ("b", 5), ("c", 5), ("d", -1)) == ["b", "c", "a", "d"]


def test_a_client_that_was_idle_has_saved_nothing_up() -> None:
    order = FairOrder()
    for _ in range(10):
        order.on_served(order.next_turn(client="busy", priority=0, cost=1))
    late = [order.next_turn(client="late", priority=0, cost=1) for _ in range(3)]
    busy = order.next_turn(client="busy", priority=0, cost=1)
    assert late[0] < busy < late[2]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), min_size=1, max_size=60))
def test_waiting_clients_get_equal_shares_of_the_cost(asked: list[tuple[str, int]]) -> None:
    order = FairOrder()
    waiting = [(order.next_turn(client=c, priority=0, cost=n), c, n) for c, n in asked]
    waiting.sort()
    got = dict.fromkeys("abc", 0)
    for place, (_, client, cost) in enumerate(waiting):
        got[client] += cost
        still = {client for _, client, _ in waiting[place + 1 :]}
        # Of two that still wait, one is never ahead by more than its dearest requests.
        for one in still:
            for other in still:
                assert got[one] - got[other] <= 18


# Waking and measuring.


async def test_a_wake_is_written_again_only_for_news_and_as_a_reminder() -> None:
    clock, patches = Clock(), Patches()
    waker = Waker(patches, clock=clock)
    written = []
    for later_s, number in [(0, 1), (1, 50), (4.5, 50), (6, 50), (31, 50)]:
        clock.now += later_s
        waker.wake(MODEL.key, number)
        await waker.close()
        written.append(len(patches.seen))
    assert written == [1, 1, 2, 2, 3]
    waker.forget(MODEL.key)
    waker.wake(MODEL.key, 1)
    await waker.close()
    assert len(patches.seen) == 4


@pytest.mark.parametrize("error", [KubeError(403, "no"), ClientError("gone")])
async def test_a_wake_that_failed_is_tried_again(error: Exception) -> None:
    clock, patches = Clock(), Patches(error)
    waker = Waker(patches, clock=clock)
    for _ in range(2):
        waker.wake(MODEL.key, 1)
        await waker.close()
        clock.now += 6
    assert len(patches.seen) == 2


def test_the_annotation_is_rfc_3339_in_utc() -> None:
    assert wake_value(datetime(2026, 1, 2, 3, 4, 5, 6, UTC), 7) == "2026-01-02T03:04:05Z;held=7"


SIZES: dict[str, tuple[dict[str, Any], tuple[bool, bool]]] = {
    "scaling": ({"scaling": {"min": 0, "max": 3}}, (True, False)),
    "a fixed size": ({"replicas": 2}, (False, False)),
    "off": ({"replicas": 0}, (False, True)),
    "nothing said": ({}, (False, False)),
}


@pytest.mark.parametrize(("spec", "expected"), SIZES.values(), ids=SIZES)
def test_what_a_deployments_size_says(spec: dict[str, Any], expected: tuple[bool, bool]) -> None:
    item = {"metadata": {"namespace": "team", "name": "tiny"}, "spec": spec}
    model = parse_model(item)
    assert (model.scales, model.is_off) == expected
    directory = Directory()
    directory.put_model(model)
    assert directory.model(("team", "tiny")) == model
