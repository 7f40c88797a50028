"""The gateway before real HTTP servers that fail the way replicas do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace

import pytest
from aiohttp import ClientError, ClientPayloadError, ClientSession

from tests.fixtures.gateway_house import CHAT, MODEL, TOKENS, MakeHouse, open_houses, until

TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=1",
}


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


async def test_a_stream_arrives_whole_and_hop_by_hop_headers_do_not(make_house: MakeHouse) -> None:
    house = await make_house([])
    async with house.client.post(
        house.url + CHAT,
        json={"model": "tiny", "stream": True},
        headers={
            **{"X-Request-Id": "abc-1", "Connection": "keep-alive, X-Hop", "X-Hop": "mine"},
            **TRACE,
        },
    ) as answer:
        assert await answer.read() == b"".join(TOKENS)
        assert answer.headers["X-Request-Id"] == "abc-1"
        assert answer.headers["X-From"] == "0"
        assert "X-Private" not in answer.headers
        assert answer.content_type == "text/event-stream"
    seen = house.replicas[0].seen[0].headers
    assert seen["X-Request-Id"] == "abc-1"
    assert "X-Hop" not in seen
    # W3C trace context: the replica's spans join the client's trace.
    assert {name: seen[name] for name in TRACE} == TRACE


async def test_tokens_are_passed_on_as_they_come(make_house: MakeHouse) -> None:
    house = await make_house(["stepwise"])
    body = {"model": "tiny", "stream": True}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        # The replica waits for us after its first token: were it held back, this would not end.
        assert await answer.content.readany() == TOKENS[0]
        house.replicas[0].may_continue.set()
        assert await answer.read() == b"".join(TOKENS[1:])


BEFORE_THE_FIRST_BYTE = {
    "dies with the request unanswered": "die_silent",
    "dies after its headers": "die_after_headers",
    "ends its stream without a byte": "end_empty",
    "is draining": "draining",
    "is busy": "busy",
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole answer"])
@pytest.mark.parametrize("act", BEFORE_THE_FIRST_BYTE.values(), ids=BEFORE_THE_FIRST_BYTE)
async def test_another_replica_answers_when_the_first_one(
    make_house: MakeHouse, act: str, stream: bool
) -> None:
    house = await make_house(act, act, [])
    house.replicas[2].always = "good"
    for _ in range(6):
        if stream:
            assert await house.stream() == b"".join(TOKENS)
        else:
            status, document, _ = await house.ask()
            assert (status, document) == (200, {"from": "2"})
    assert house.sample("mizzen_gateway_requests_total", code="200") == 6
    reason = {"draining": "draining", "busy": "busy"}.get(act, "lost")
    assert house.sample("mizzen_gateway_retries_total", reason=reason) >= 1


async def test_a_replica_that_cannot_be_reached_is_passed_over(make_house: MakeHouse) -> None:
    house = await make_house([], [])
    await house.replicas[0].stop()
    for _ in range(4):
        assert (await house.ask())[1] == {"from": "1"}
    # Once failed it is chosen last, so only the first request paid for finding out.
    assert house.sample("mizzen_gateway_retries_total", reason="unreachable") == 1
    await house.replicas[0].start()


async def test_a_request_waits_for_the_replica_that_replaces_a_draining_one(
    make_house: MakeHouse,
) -> None:
    house = await make_house("draining", [], retry_window_s=30)
    house.serve(house.replicas[0])
    asking = asyncio.create_task(house.ask())
    await until(lambda: house.replicas[0].seen)
    house.serve(house.replicas[1])
    assert (await asking)[1] == {"from": "1"}


async def test_a_request_may_have_waited_long_before_its_replica_is_lost(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["linger_and_die"], retry_window_s=0.3)
    asking = asyncio.create_task(house.ask())
    await until(lambda: house.replicas[0].seen)
    await asyncio.sleep(0.5)
    house.replicas[0].may_continue.set()
    assert (await asking)[1] == {"from": "0"}


async def test_a_request_that_kills_replicas_is_not_handed_round_all_of_them(
    make_house: MakeHouse,
) -> None:
    house = await make_house(*["die_silent"] * 5, max_resends=2, retry_window_s=30)
    status, document, headers = await house.ask()
    assert status == 503
    assert "No replica of 'tiny' answered" in document["error"]["message"]
    assert headers["Retry-After"]
    assert sum(len(replica.seen) for replica in house.replicas) == 3


async def test_a_lone_replica_gets_the_request_again_over_a_new_connection(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["good", "die_silent", "good"])
    assert (await house.ask())[0] == 200
    assert (await house.ask())[0] == 200


async def test_all_busy_is_said_with_the_replicas_own_words(make_house: MakeHouse) -> None:
    house = await make_house("busy", "busy")
    status, document, headers = await house.ask()
    assert (status, document["error"]["message"]) == (429, "queue is full")
    assert headers["Retry-After"] == "7"
    assert [len(replica.seen) for replica in house.replicas] == [1, 1]


@pytest.mark.parametrize("act", ["die_mid_stream", "end_early", "end_after_the_word_error"])
async def test_a_stream_cut_in_the_middle_ends_with_an_error_event(
    make_house: MakeHouse, act: str
) -> None:
    house = await make_house([act], [])
    house.serve(house.replicas[0])
    text = (await house.stream()).decode()
    assert text.startswith(TOKENS[0].decode())
    event = json.loads(text.rstrip().rsplit("data: ", 1)[1])
    assert event["error"]["code"] == "replica_lost"
    assert "[DONE]" not in text
    assert house.sample("mizzen_gateway_cut_streams_total") == 1
    assert not house.replicas[1].seen


async def test_an_answer_cut_in_the_middle_is_not_taken_for_a_whole_one(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["die_mid_json"])
    async with house.client.post(house.url + CHAT, json={"model": "tiny"}) as answer:
        with pytest.raises(ClientPayloadError):
            await answer.read()


@pytest.mark.parametrize("act", ["silent", "stepwise"], ids=["before", "after the first token"])
async def test_a_client_that_leaves_stops_the_replica(make_house: MakeHouse, act: str) -> None:
    house = await make_house([act])
    replica = house.replicas[0]
    asking = asyncio.create_task(house.stream())
    await until(lambda: replica.seen)
    await asyncio.sleep(0.05)
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    await until(replica.cancelled.is_set)
    await until(lambda: not house.sample("mizzen_gateway_in_flight_requests"))
    await until(lambda: not house.gateway.balancer.in_flight(replica.url))


async def test_a_slow_client_holds_its_replica_back(make_house: MakeHouse) -> None:
    house = await make_house(["flood"])
    replica = house.replicas[0]
    async with house.client.post(house.url + CHAT, json={"model": "tiny"}) as answer:
        await answer.content.readany()
        before = -1
        while replica.written_bytes != before:
            before = replica.written_bytes
            await asyncio.sleep(0.5)
        # What is under way fits in the buffers of four sockets: nothing piles up in between.
        assert before < 64 * 2**20
        answer.close()


async def test_the_least_loaded_replica_is_chosen(make_house: MakeHouse) -> None:
    house = await make_house("stepwise", "stepwise", "stepwise")
    streams = [asyncio.create_task(house.stream()) for _ in range(6)]
    await until(lambda: sum(len(replica.seen) for replica in house.replicas) == 6)
    assert [len(replica.seen) for replica in house.replicas] == [2, 2, 2]
    for replica in house.replicas:
        replica.may_continue.set()
    assert await asyncio.gather(*streams) == [b"".join(TOKENS)] * 6


async def test_the_turns_of_a_conversation_meet_one_replica_through_any_gateway(
    make_house: MakeHouse,
) -> None:
    house, other = await make_house([], [], []), await make_house()
    other.serve(*house.replicas)
    places = set()
    for n in range(16):
        first = [f"conversation {n}"]
        whole = [*first, "an answer", "and then?"]
        asked = [await house.turn(*first), await other.turn(*first), await house.turn(*whole)]
        assert len(set(asked)) == 1
        places.add(asked[0])
    assert len(places) > 1


async def test_a_session_meets_one_replica_whatever_it_asks(make_house: MakeHouse) -> None:
    house = await make_house([], [], [])
    mine = {await house.turn(f"topic {n}", **{"X-Session-Id": "me"}) for n in range(8)}
    assert len(mine) == 1


async def test_an_adapters_requests_go_where_it_is_loaded(make_house: MakeHouse) -> None:
    house = await make_house([], [], [])
    loaded = frozenset({("support", "pod-1"), ("other", "pod-2")})
    house.serve(*house.replicas, model=replace(MODEL, loaded=loaded))
    for _ in range(4):
        assert (await house.ask(model="tiny:support"))[1] == {"from": "1"}
    # Where no replica is known to have it, one of them says that.
    assert (await house.ask(model="tiny:unheard"))[0] == 200


async def test_a_replica_of_errors_is_passed_over_and_then_tried_again(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["crashed"] * 5, [], eject_s=60)
    bad, outliers = house.replicas[0], house.gateway.balancer.outliers
    began_at = time.monotonic()
    outliers._clock = lambda: began_at
    for _ in range(10):
        await house.ask()
    seen = len(bad.seen)
    assert seen == 5
    for _ in range(4):
        assert (await house.ask())[1] == {"from": "1"}
    outliers._clock = lambda: began_at + 61
    await asyncio.gather(*(house.ask() for _ in range(4)))
    assert len(bad.seen) > seen


async def test_an_endpoint_the_runtime_lacks_is_refused_in_openais_shape(
    make_house: MakeHouse,
) -> None:
    house = await make_house("not_here")
    async with house.client.post(
        house.url + "/v1/embeddings", json={"model": "tiny", "input": "x"}
    ) as answer:
        assert answer.status == 404
        error = (await answer.json())["error"]
    assert error["message"] == "This model's runtime does not offer /v1/embeddings."
    assert error["code"] == "unsupported_endpoint"


async def test_a_crash_is_reported_once_and_in_openais_shape(make_house: MakeHouse) -> None:
    house = await make_house("crashed", "crashed")
    status, document, _ = await house.ask()
    assert status == 500
    assert document["error"]["message"] == "The replica answered 500: Internal Server Error"
    assert sum(len(replica.seen) for replica in house.replicas) == 1


async def test_a_replica_that_stays_silent_is_given_up(make_house: MakeHouse) -> None:
    house = await make_house("silent", read_timeout_s=0.2)
    status, document, _ = await house.ask()
    assert status == 504
    assert "did not answer within 0.2 seconds" in document["error"]["message"]


async def test_a_known_model_without_a_replica_is_503_with_retry_after(
    make_house: MakeHouse,
) -> None:
    house = await make_house()
    status, document, headers = await house.ask()
    assert status == 503
    assert document["error"]["code"] == "model_not_ready"
    assert "kubectl -n team describe llmdeployment tiny" in document["error"]["message"]
    assert int(headers["Retry-After"]) > 0


async def test_the_replica_sees_the_name_it_knows(make_house: MakeHouse) -> None:
    house = await make_house([])
    for asked in ("team/tiny", "team/tiny:support", "tiny:support", "tiny"):
        assert (await house.ask(model=asked, keep=1))[0] == 200
    bodies = [json.loads(body) for body in house.replicas[0].bodies]
    assert [b["model"] for b in bodies] == ["tiny", "tiny:support", "tiny:support", "tiny"]
    assert all(b["keep"] == 1 for b in bodies)


async def test_shutting_down_lets_open_streams_end_and_takes_no_new_ones(
    make_house: MakeHouse,
) -> None:
    house = await make_house("stepwise", drain_s=60)
    replica = house.replicas[0]
    stream = asyncio.create_task(house.stream())
    await until(lambda: replica.seen)
    url = house.url
    draining = asyncio.create_task(house.gateway.drain())
    async with asyncio.timeout(300):
        while True:
            try:
                async with ClientSession() as client, client.get(url + "/v1/models"):
                    await asyncio.sleep(0.01)
            except (OSError, ClientError):
                break
    assert not draining.done()
    replica.may_continue.set()
    assert await stream == b"".join(TOKENS)
    await draining


async def test_series_of_replicas_that_are_gone_are_dropped(make_house: MakeHouse) -> None:
    house = await make_house([], [])
    for _ in range(2):
        await house.ask()
    gone = house.replicas[0].url.removeprefix("http://")
    assert house.sample("mizzen_gateway_upstream_picks_total", endpoint=gone) == 1
    house.serve(house.replicas[1])
    assert house.sample("mizzen_gateway_upstream_picks_total", endpoint=gone) == 0
    assert house.sample("mizzen_gateway_endpoints_ready") == 1
