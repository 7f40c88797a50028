"""What the OpenAI calls answer to bad input, and to an engine in trouble."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from mizzen.runtime.engine.errors import EngineBusyError, EngineDeadError, GenerationFailedError
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.openai_calls import CHAT, COMPLETIONS, chat, events
from tests.fixtures.runtime_server import Running, eventually, running_server

# One server for all tests here; each begins with the engine as new.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("fake")]
ENGINE = FakeEngine()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    async with running_server(ENGINE) as running:
        yield running


@pytest.fixture
def fake() -> FakeEngine:
    ENGINE.reset()
    return ENGINE


BAD_BODIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "negative max_tokens": (chat(max_tokens=-5), "max_tokens", "greater than or equal to 1"),
    "zero n": (chat(n=0), "n", "greater than or equal to 1"),
    "too many answers": (chat(n=1000), "n", "less than or equal to 32"),
    "hot": (chat(temperature=3), "temperature", "less than or equal to 2"),
    "no messages": (chat(messages=[]), "messages", "at least 1 item"),
    "unknown role": (chat(messages=[{"role": "x", "content": "y"}]), "messages.0.role", "'user'"),
    "no content": (chat(messages=[{"role": "user"}]), "messages.0", "needs content"),
    "an image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        "messages.0.content.0.type",
        "'text'",
    ),
    "unknown field": (chat(max_token=5), "max_token", "Unrecognized request argument"),
    "unknown format": (chat(response_format={"type": "x"}), "response_format.type", "'text'"),
    "empty stop": (chat(stop=[""]), "stop.0", "at least 1 character"),
    "bias out of range": (chat(logit_bias={"5": 900}), "logit_bias.5", "less than or equal to 100"),
    "infinite": (chat(temperature=float("inf")), "temperature", "finite"),
    "a number as text": (chat(max_tokens="5"), "max_tokens", "valid integer"),
    "a number with a point": (chat(seed=1.0), "seed", "valid integer"),
    "a truth for a number": (chat(n=True), "n", "valid integer"),
    "a temperature as text": (chat(temperature="0.5"), "temperature", "valid number"),
    "a truth as text": (chat(stream="true"), "stream", "valid boolean"),
    "an option as text": (
        chat(stream=True, stream_options={"include_usage": "yes"}),
        *("stream_options.include_usage", "valid boolean"),
    ),
    "a token that no number holds": (
        chat(stop_token_ids=[10**30]),
        *("stop_token_ids.0", "less than or equal to"),
    ),
    "a bias of a token that no number holds": (
        chat(logit_bias={"1" + "0" * 30: 1}),
        *("logit_bias.1" + "0" * 30, "less than or equal to"),
    ),
}


@pytest.mark.parametrize(("body", "param", "text"), BAD_BODIES.values(), ids=BAD_BODIES)
async def test_a_wrong_field_is_named(
    running: Running, body: dict[str, Any], param: str, text: str
) -> None:
    answer = await running.http.post(CHAT, content=json.dumps(body))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert text in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000])
async def test_what_is_no_json_object_is_a_400(running: Running, body: bytes) -> None:
    answer = await running.http.post(CHAT, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_an_unknown_model_is_a_404_that_lists_what_there_is(running: Running) -> None:
    for path, body in ((CHAT, chat(model="gpt")), (COMPLETIONS, {"model": "gpt", "prompt": "x"})):
        answer = await running.http.post(path, json=body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "Served now: tiny" in answer.json()["error"]["message"]


async def test_a_prompt_over_the_context_is_told_both_numbers(running: Running) -> None:
    asked = {"model": "tiny", "prompt": "x" * 500}
    answer = await running.http.post(COMPLETIONS, json=asked)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert "500" in error["message"]
    assert "128" in error["message"]
    streamed = await running.http.post(COMPLETIONS, json=asked | {"stream": True})
    assert streamed.status_code == 400


async def test_a_token_outside_the_vocabulary_is_a_400(running: Running) -> None:
    answer = await running.http.post(COMPLETIONS, json={"model": "tiny", "prompt": [1, 2**30]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_scores_that_would_fill_the_memory_are_a_400(running: Running) -> None:
    asked = {"prompt": ["x" * 127] * 64, "prompt_samples": 1024, "prompt_logprobs": 20}
    body = {"model": "tiny", "max_tokens": 0, **asked}
    error = (await running.http.post(COMPLETIONS, json=body)).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "prompt")
    assert "would have 8493760 numbers, and 8388608 are the most" in error["message"]


async def test_a_refusing_template_is_a_400(running: Running) -> None:
    answer = await running.http.post(CHAT, json=chat(messages=[{"role": "assistant"}]))
    assert answer.status_code == 400
    assert "must not be the assistant's" in answer.json()["error"]["message"]


async def test_a_full_queue_is_a_429_with_retry_after(running: Running, fake: FakeEngine) -> None:
    fake.refuse = EngineBusyError("512 requests wait already.", retry_after_s=2.4)
    for body in (chat(), chat(stream=True), chat(n=2, stream=True)):
        answer = await running.http.post(CHAT, json=body)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "2"
        assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_a_dead_engine_is_a_503(running: Running, fake: FakeEngine) -> None:
    fake.alive = False
    answer = await running.http.post(CHAT, json=chat())
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_dead"
    assert "retry-after" in answer.headers


async def test_an_engine_that_dies_in_mid_stream_is_told_in_the_stream(
    running: Running, fake: FakeEngine
) -> None:
    fake.fail_after, fake.fail_with = 3, EngineDeadError("The engine's loop has stopped.")
    answer = await running.http.post(CHAT, json=chat(stream=True))
    got = events(answer.text)
    assert got[-1]["error"]["code"] == "engine_dead"
    assert "[DONE]" not in got


async def test_a_bug_is_a_500_without_its_details(running: Running, fake: FakeEngine) -> None:
    fake.refuse = ValueError("a secret path")
    answer = await running.http.post(CHAT, json=chat())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


async def test_numbers_that_overflow_are_told_apart_from_bugs(
    running: Running, fake: FakeEngine
) -> None:
    fake.refuse = GenerationFailedError("The model's numbers overflowed on this input.")
    answer = await running.http.post(CHAT, json=chat())
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"


async def test_one_failing_answer_of_n_ends_the_others(running: Running, fake: FakeEngine) -> None:
    fake.fail_after, fake.fail_with = 2, EngineDeadError("The engine's loop has stopped.")
    assert (await running.http.post(CHAT, json=chat(n=4))).status_code == 503
    await eventually(lambda: fake.in_flight() == 0)


async def test_unknown_addresses_and_methods_are_told_in_openai_shape(running: Running) -> None:
    for answer in (await running.http.get("/v1/nope"), await running.http.get(CHAT)):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["message"]


async def test_requests_while_the_model_loads_are_told_to_come_back() -> None:
    async def load(*_: Any) -> FakeEngine:
        await asyncio.Event().wait()
        raise AssertionError

    async with running_server(load, wait=False) as running:
        for name in ("tiny", "tiny:support"):
            answer = await running.http.post(CHAT, json=chat(model=name))
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
