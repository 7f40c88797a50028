"""What a key may use, what is said when it has used it, and clients that only take up room."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession
from hypothesis import given
from hypothesis import strategies as st

from mizzen.runtime.gateway.errors import RateLimitedError
from mizzen.runtime.gateway.keys import (
    LIMITS_ANNOTATION,
    KeyHash,
    Keyring,
    hash_key,
    parse_hash,
    parse_lines,
    print_key_secret,
)
from mizzen.runtime.gateway.limits import Account, Bucket, Limits, parse_limits
from mizzen.runtime.gateway.sinks import KeySink
from mizzen.runtime.gateway.tokens import TokenMeter, expected_tokens
from tests.fixtures.clock import Clock
from tests.fixtures.gateway_house import CHAT, TOKENS, House, MakeHouse, open_houses, until


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def key_hash(key: str, words: str = "") -> KeyHash:
    hashed = parse_hash(hash_key(key))
    assert hashed is not None
    return KeyHash(hashed.salt, hashed.digest, parse_limits(words))


def let_in(house: House, **keys: str) -> None:
    """Ask for a key from now on; each is named like its id and has these limits."""
    house.gateway.config.auth = "on"
    house.gateway.keyring.replace("test", {k: key_hash(k, words) for k, words in keys.items()})


async def ask(house: House, key: str, **fields: object) -> tuple[int, Any, Any]:
    async with house.client.post(
        house.url + CHAT,
        json={"model": "tiny", **fields},
        headers={"Authorization": f"Bearer {key}"},
    ) as answer:
        return answer.status, await answer.read(), answer.headers


# Through the gateway.


async def test_requests_beyond_the_minutes_allowance_are_429_and_other_keys_are_not(
    make_house: MakeHouse,
) -> None:
    house = await make_house([])
    let_in(house, alice="requests-per-minute=2", bob="")
    status, _, headers = await ask(house, "alice")
    assert status == 200
    assert headers["x-ratelimit-limit-requests"] == "2"
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-reset-requests"].endswith("s")
    assert (await ask(house, "alice"))[0] == 200
    status, text, headers = await ask(house, "alice")
    assert status == 429
    error = json.loads(text)["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert error["message"].startswith("This API key may use 2 requests per minute. Try again in")
    assert 1 <= int(headers["Retry-After"]) <= 30
    assert headers["x-ratelimit-remaining-requests"] == "0"
    status, _, headers = await ask(house, "bob")
    assert status == 200
    assert "x-ratelimit-limit-requests" not in headers
    assert len(house.replicas[0].seen) == 3


async def test_tokens_are_charged_by_what_the_answer_says(make_house: MakeHouse) -> None:
    house = await make_house("usage")
    stop_the_clock(house)
    let_in(house, alice="tokens-per-minute=1000")
    status, _, headers = await ask(house, "alice")
    assert (status, headers["x-ratelimit-limit-tokens"]) == (200, "1000")
    await until(lambda: left(house) == 100)  # the answer said 900
    status, text, _ = await ask(house, "alice", max_tokens=500)
    assert (status, json.loads(text)["error"]["type"]) == (429, "tokens")
    assert (await ask(house, "alice", max_tokens=50))[0] == 200


def stop_the_clock(house: House) -> None:
    """Have no allowance refill: what is left says what was used."""
    house.gateway.accounts._clock = lambda: 0.0


def left(house: House) -> float:
    account = house.gateway.accounts.of("test:alice", parse_limits("tokens-per-minute=1000"))
    assert account.tokens is not None
    return account.tokens.left(account.clock())


async def test_what_a_failed_request_was_charged_comes_back(make_house: MakeHouse) -> None:
    house = await make_house("crashed")
    let_in(house, alice="tokens-per-minute=1000")
    for _ in range(3):
        assert (await ask(house, "alice", max_tokens=900))[0] == 500


async def test_an_answer_that_may_be_endless_takes_no_more_than_a_minutes_tokens(
    make_house: MakeHouse,
) -> None:
    house = await make_house("usage")
    stop_the_clock(house)
    let_in(house, alice="tokens-per-minute=1000")
    assert (await ask(house, "alice", max_tokens=10**400))[0] == 200
    await until(lambda: left(house) == 100)  # the answer said 900


async def test_a_key_has_no_more_requests_open_than_it_may(make_house: MakeHouse) -> None:
    house = await make_house("stepwise")
    let_in(house, alice="concurrency=1")
    replica = house.replicas[0]
    first = asyncio.create_task(ask(house, "alice", stream=True))
    await until(lambda: replica.seen)
    status, text, headers = await ask(house, "alice")
    assert (status, headers["Retry-After"]) == (429, "1")
    assert "has 1 requests open, which is its limit" in json.loads(text)["error"]["message"]
    replica.may_continue.set()
    assert (await first)[0] == 200
    assert (await ask(house, "alice", stream=True))[0] == 200


async def test_a_priority_goes_first_and_a_greedy_key_delays_another_by_one_request(
    make_house: MakeHouse,
) -> None:
    house = await make_house("silent", replica_requests=1, queue_timeout_s=60)
    let_in(house, greedy="", modest="", urgent="priority=5")
    room, replica = house.gateway.admission.room, house.replicas[0]
    asking = [asyncio.create_task(ask(house, "greedy", who="greedy")) for _ in range(5)]
    await until(lambda: replica.seen and room.held(("team", "tiny")) == 4)
    for name in ("modest", "urgent"):
        held = room.held(("team", "tiny"))
        asking.append(asyncio.create_task(ask(house, name, who=name)))
        await until(lambda held=held: room.held(("team", "tiny")) == held + 1)
    replica.may_continue.set()
    assert [status for status, _, _ in await asyncio.gather(*asking)] == [200] * 7
    order = [json.loads(body)["who"] for body in replica.bodies]
    assert order[1] == "urgent"
    assert order.index("modest") <= 3


async def test_an_answer_that_says_it_is_too_long_is_an_error(make_house: MakeHouse) -> None:
    house = await make_house("huge", max_answer_mib=1)
    status, document, _ = await house.ask()
    assert (status, document["error"]["code"]) == (502, "response_too_large")
    assert "raise gateway.maxAnswerMiB" in document["error"]["message"]
    assert not house.gateway.balancer.in_flight(house.replicas[0].url)


async def test_an_answer_without_end_is_cut_and_the_client_told(make_house: MakeHouse) -> None:
    house = await make_house("flood", max_answer_mib=1)
    text = await house.stream()
    assert len(text) < 2 * 2**20
    assert json.loads(text.rsplit(b"data: ", 1)[1])["error"]["code"] == "response_too_large"
    await until(lambda: not house.gateway.balancer.in_flight(house.replicas[0].url))


# Clients that only take up room.


async def test_connections_that_send_nothing_or_dribble_are_closed(make_house: MakeHouse) -> None:
    house = await make_house([], header_timeout_s=0.2, idle_timeout_s=0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
    whole = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    ends = []
    for sent in (b"", head, whole):
        reader, writer = await asyncio.open_connection("127.0.0.1", house.gateway.port)
        writer.write(sent)
        ends.append((reader, writer))
    for reader, writer in ends:
        async with asyncio.timeout(60):
            try:
                while await reader.read(65536):
                    pass
            except ConnectionResetError:
                pass
        writer.close()
    # A request that takes its time is not an idle connection.
    slow = await make_house("stepwise", header_timeout_s=0.2, idle_timeout_s=0.2)
    stream = asyncio.create_task(slow.stream())
    await asyncio.sleep(2.5)
    slow.replicas[0].may_continue.set()
    assert await stream == b"".join(TOKENS)


async def test_above_the_most_connections_the_longest_idle_go(make_house: MakeHouse) -> None:
    house = await make_house([], max_connections=2)
    writers = []
    for _ in range(5):
        _, writer = await asyncio.open_connection("127.0.0.1", house.gateway.port)
        writers.append(writer)
    api = house.gateway._api
    assert api is not None
    assert api.server is not None
    server = api.server
    await until(lambda: len(server.connections) == 2)
    async with ClientSession() as client, client.get(house.url + "/v1/models") as answer:
        assert answer.status == 200
    for writer in writers:
        writer.close()


async def test_a_client_that_never_reads_is_let_go_and_its_replica_too(
    make_house: MakeHouse,
) -> None:
    house = await make_house("flood", stall_timeout_s=0.5, max_answer_mib=4096)
    body = b'{"model": "tiny", "stream": true}'
    _, writer = await asyncio.open_connection("127.0.0.1", house.gateway.port, limit=1024)
    writer.write(
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
        % (CHAT.encode(), len(body), body)
    )
    await until(house.replicas[0].cancelled.is_set)
    await until(lambda: not house.gateway.balancer.in_flight(house.replicas[0].url))
    writer.close()


# How limits are written.


def test_limits_are_printed_with_the_key_and_read_back_from_its_secret() -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=10**5, concurrency=4, priority=-1)
    out = io.StringIO()
    key = print_key_secret("ci", limits, out=out, notes=io.StringIO())
    secret = yaml.safe_load(out.getvalue())
    assert secret["metadata"]["annotations"][LIMITS_ANNOTATION] == str(limits)
    assert parse_limits(str(limits)) == limits
    line = f"ci {secret['stringData']['ci']} {limits}"
    ring = Keyring()
    ring.replace("file", parse_lines([line]))
    client = ring.identify(key)
    assert client is not None
    assert client.limits == limits


BAD_LIMITS = {
    "another word": ("rpm=5", "'rpm=5' is no limit; write NAME=NUMBER with requests-per-minute"),
    "no number": ("concurrency=many", "'concurrency=many' is no limit"),
    "none at all": ("concurrency=0", "'concurrency=0' is out of range: write a number from 1 to "),
    "endless": (f"concurrency={'9' * 5000}", "is out of range: write a number from 1 to "),
    "too urgent": (
        "priority=101",
        "'priority=101' is out of range: write a number from -100 to 100",
    ),
}


@pytest.mark.parametrize(("text", "says"), BAD_LIMITS.values(), ids=BAD_LIMITS)
def test_a_limit_that_cannot_be_read_is_named_and_lets_nobody_in(
    text: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"is no limit|out of range"):
        parse_limits(text)
    with pytest.raises(ValueError, match="Line 1 of the keys file: "):
        parse_lines([f"ci {hash_key('k')} {text}"])
    ring = Keyring()
    data = {"ci": base64.b64encode(hash_key("k").encode()).decode()}
    for words, is_let_in in (("concurrency=1", True), (text, False)):
        noted = {LIMITS_ANNOTATION: words}
        metadata = {"name": "s", "namespace": "n", "annotations": noted}
        KeySink(ring).put({"metadata": metadata, "data": data})
        assert (ring.identify("k") is not None) is is_let_in
    assert says in caplog.text


# Counting.


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50))))
def test_no_minute_gives_more_than_two_allowances(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """A full bucket and its refill: what a token bucket allows at most in any minute."""
    now, bucket, taken = 0.0, Bucket(per_minute, 0.0), []
    for pause_s, amount in steps:
        now += pause_s
        if bucket.wait_s(amount, now) == 0 and amount <= per_minute:
            bucket.take(amount, now)
            taken.append((now, amount))
    for start, _ in taken:
        assert sum(n for at, n in taken if start <= at < start + 60) <= 2 * per_minute


@pytest.mark.parametrize(("per_minute", "lines"), [(1, 1), (2, 1), (3, 1), (4, 2), (10, 5)])
def test_batches_get_half_of_a_minute_s_requests_and_one_at_least(
    per_minute: int, lines: int
) -> None:
    account = Account(Limits(requests_per_minute=per_minute), clock=lambda: 0.0)
    for _ in range(lines):
        account.take_background(requests=1)
    with pytest.raises(RateLimitedError, match=f"Half of this API key's {per_minute} requests per"):
        account.take_background(requests=1)
    account.take_background(requests=0)


def test_batches_wait_while_half_of_a_minute_s_tokens_are_used() -> None:
    account = Account(Limits(tokens_per_minute=100), clock=lambda: 0.0)
    account.charge_tokens(49)
    account.take_background(requests=1)
    account.charge_tokens(1)
    with pytest.raises(RateLimitedError, match="Half of this API key's 100 tokens per minute"):
        account.take_background(requests=0)


def test_after_the_stated_wait_the_request_is_let_through() -> None:
    clock = Clock()
    account = Account(Limits(requests_per_minute=6), clock)
    for _ in range(6):
        with account.request():
            pass
    with pytest.raises(RateLimitedError) as refused, account.request():
        pass
    clock.now += refused.value.retry_after_s
    with account.request():
        pass


def test_tokens_are_read_from_an_answers_end_or_counted_by_its_events() -> None:
    whole, stream, none = TokenMeter(7), TokenMeter(7), TokenMeter(7)
    for part in (b'{"choices": [], "usage": {"prompt_tokens": 3, "tot', b'al_tokens": 12}}'):
        whole.feed(part)
    for token in TOKENS:
        stream.feed(token)
    assert (whole.used(), stream.used(), none.used()) == (12, 7 + len(TOKENS), 0)
    assert expected_tokens({"max_tokens": 100}, 400) == 200
