"""The OpenAI calls over plain HTTP: shapes of answers."""

import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mizzen.runtime.engine.api import TokenLogprob
from mizzen.runtime.server.openai_logprobs import CompletionLogprobs
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.openai_calls import CHAT, COMPLETIONS, chat, events
from tests.fixtures.runtime_server import Running, running_server

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


async def test_a_chat_answer_has_text_reason_and_usage(running: Running) -> None:
    answer = await running.http.post(CHAT, json=chat())
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    choice = body["choices"][0]
    assert choice["message"]["content"] == "Hello world"
    assert choice["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 11
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_a_stream_tells_the_role_then_text_then_the_reason(running: Running) -> None:
    answer = await running.http.post(CHAT, json=chat(stream=True, max_tokens=3))
    assert answer.headers["content-type"].startswith("text/event-stream")
    got = events(answer.text)
    assert got[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in got[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "Hel"
    assert [event["choices"][0]["finish_reason"] for event in got[:-1]][-1] == "length"
    assert len({event["id"] for event in got[:-1]}) == 1
    assert not any("usage" in event for event in got[:-1])


async def test_include_usage_ends_the_stream_with_usage_and_no_choice(running: Running) -> None:
    asked = chat(stream=True, stream_options={"include_usage": True})
    got = events((await running.http.post(CHAT, json=asked)).text)
    assert got[-2]["choices"] == []
    assert got[-2]["usage"]["completion_tokens"] == 11
    assert all(event["usage"] is None for event in got[:-2])


async def test_text_survives_a_stream_unchanged(running: Running, fake: FakeEngine) -> None:
    fake.says = 'quotes " and \\ and \n and \u2028 and 日本 and 🦜 end'
    got = events((await running.http.post(CHAT, json=chat(stream=True))).text)
    pieces = [event["choices"][0]["delta"].get("content", "") for event in got[:-1]]
    assert "".join(pieces) == fake.says


async def test_n_answers_have_an_index_each_and_seeds_of_their_own(
    running: Running, fake: FakeEngine
) -> None:
    body = (await running.http.post(CHAT, json=chat(n=3, seed=7))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {request.sampling.seed for request in fake.requests} == {7, 8, 9}
    assert body["usage"]["completion_tokens"] == 33
    assert body["usage"]["prompt_tokens"] == len(fake.requests[0].prompt_token_ids)


async def test_a_stream_of_n_answers_ends_each(running: Running) -> None:
    got = events((await running.http.post(CHAT, json=chat(n=2, stream=True))).text)
    choices = [event["choices"][0] for event in got[:-1]]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hello world"
        assert mine[-1]["finish_reason"] == "stop"


async def test_sampling_parameters_reach_the_engine(running: Running, fake: FakeEngine) -> None:
    asked = chat(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        presence_penalty=0.2,
        frequency_penalty=-0.2,
        repetition_penalty=1.1,
        seed=3,
        max_completion_tokens=5,
        min_tokens=2,
        stop="x",
        stop_token_ids=[9],
        ignore_eos=True,
        logit_bias={"5": -100},
        priority=4,
        cache_salt="tenant",
        user="somebody",
    )
    assert (await running.http.post(CHAT, json=asked)).status_code == 200
    request = fake.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.2, -0.2)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (3, 5, 2)
    assert (sampling.stop, sampling.stop_token_ids) == (("x",), (9,))
    assert sampling.ignore_eos
    assert dict(sampling.logit_bias) == {5: -100.0}
    assert (request.priority, request.cache_salt) == (4, "tenant")


async def test_null_means_not_set(running: Running, fake: FakeEngine) -> None:
    asked = chat(temperature=None, top_p=None, n=None, stop=None, stream=None, logit_bias=None)
    assert (await running.http.post(CHAT, json=asked)).status_code == 200
    assert fake.requests[0].sampling.temperature == 1.0


async def test_messages_reach_the_template_as_plain_turns(
    running: Running, fake: FakeEngine
) -> None:
    messages = [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    await running.http.post(CHAT, json=chat(messages=messages))
    text = fake.tokenizer.decode(fake.requests[0].prompt_token_ids)
    assert text == "<system>be short<user>ab<assistant>"


async def test_what_is_long_is_read_beside_the_event_loop(
    running: Running, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[threading.Thread]] = {}

    def noted(name: str, result: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread())
            return result

        return call

    monkeypatch.setattr(fake.tokenizer, "apply_chat_template", noted("a call's arguments", [5]))
    monkeypatch.setattr(fake.tokenizer, "encode", noted("many inputs", [5]))
    monkeypatch.setattr(fake.tokenizer, "decode", noted("many tokens", "x"))
    function = {"name": "f", "arguments": json.dumps({"a": "x" * 30_000})}
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "user", "content": "and?"},
    ]
    for path, body in {
        CHAT: chat(messages=turns, max_tokens=1),
        COMPLETIONS: {"model": "tiny", "prompt": ["x" * 900] * 30, "max_tokens": 1},
        "/detokenize": {"tokens": [5] * 30_000},
    }.items():
        assert (await running.http.post(path, json=body)).status_code == 200
    # The engine, which is none here, encodes its own words in the main thread.
    assert all(seen - {threading.main_thread()} for seen in threads.values())
    assert len(threads) == 3


async def test_chat_logprobs_give_each_token_and_its_alternatives(running: Running) -> None:
    asked = chat(logprobs=True, top_logprobs=2, max_tokens=2)
    body = (await running.http.post(CHAT, json=asked)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["H", "e"]
    assert content[0]["bytes"] == [ord("H")]
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["H", "I"]
    streamed = events((await running.http.post(CHAT, json=asked | {"stream": True})).text)
    tokens = [
        entry["token"]
        for event in streamed[:-1]
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert tokens == ["H", "e"]


async def test_completion_logprobs_are_parallel_lists_with_offsets(running: Running) -> None:
    asked = {"model": "tiny", "prompt": "x", "logprobs": 1, "max_tokens": 3}
    got = (await running.http.post(COMPLETIONS, json=asked)).json()["choices"][0]["logprobs"]
    assert got["tokens"] == ["H", "e", "l"]
    assert got["text_offset"] == [0, 1, 2]
    assert got["top_logprobs"][0] == {"H": -0.5}
    body = CompletionLogprobs(ENGINE.tokenizer).body(
        [TokenLogprob(token_id=ord("z") + 2, logprob=-9.0, top=((ord("H") + 2, -0.5),))]
    )
    assert body["top_logprobs"] == [{"H": -0.5, "z": -9.0}]
    streamed = events((await running.http.post(COMPLETIONS, json=asked | {"stream": True})).text)
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in streamed[:-1]]
    assert offsets == [[0], [1], [2]]


async def test_a_completion_takes_texts_and_tokens(running: Running, fake: FakeEngine) -> None:
    ids = fake.tokenizer.encode("cd")
    for prompt, expected in [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        (ids, ["cd"]),
        ([ids, ids], ["cd", "cd"]),
    ]:
        fake.requests.clear()
        answer = await running.http.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt})
        assert answer.status_code == 200
        prompts = [fake.tokenizer.decode(request.prompt_token_ids) for request in fake.requests]
        assert prompts == expected
        assert len(answer.json()["choices"]) == len(expected)


async def test_echo_repeats_the_prompt(running: Running) -> None:
    asked = {"model": "tiny", "prompt": ["one ", "two "], "echo": True, "n": 2, "max_tokens": 5}
    body = (await running.http.post(COMPLETIONS, json=asked)).json()
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == ["one Hello", "one Hello", "two Hello", "two Hello"]
    streamed = events((await running.http.post(COMPLETIONS, json=asked | {"stream": True})).text)
    first = "".join(
        event["choices"][0]["text"] for event in streamed[:-1] if event["choices"][0]["index"] == 0
    )
    assert first == "one Hello"


async def test_the_request_id_comes_back(running: Running) -> None:
    named = await running.http.post(CHAT, json=chat(), headers={"X-Request-Id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    unnamed = await running.http.post(CHAT, json=chat())
    assert len(unnamed.headers["x-request-id"]) == 32
    silly = await running.http.post(CHAT, json=chat(), headers={"X-Request-Id": "a b\tc"})
    assert silly.headers["x-request-id"] not in ("a b\tc", "")


async def test_models_lists_the_base_and_its_adapters(fake: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    await fake.load_adapter("support", tmp_path)
    async with running_server(fake) as running:
        listed = (await running.http.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["tiny", "support"]
        assert listed["data"][1]["parent"] == "tiny"
        one = await running.http.get("/v1/models/tiny:support")
        assert one.status_code == 200
        assert (await running.http.get("/v1/models/other")).status_code == 404
        for name in ("support", "tiny:support"):
            answer = await running.http.post(CHAT, json=chat(model=name))
            assert answer.json()["model"] == name
        assert [request.adapter for request in fake.requests] == ["support", "support"]
