"""Answers as guardrails of stage Output let them through, by a real gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fixtures.gateway_house import CHAT, MakeHouse, open_houses, until
from tests.fixtures.guarded_model import model, post, said
from tests.fixtures.runtime_server import running_tiny_model


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


OUT = {"name": "no-keys-out", "stage": "Output", "deny": ["sk-[0-9]{3}"]}


async def test_a_stream_ends_where_a_guardrail_is_hit_and_the_replica_stops(
    make_house: MakeHouse,
) -> None:
    house = await make_house("says_secret")
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    body = {"model": "tiny", "stream": True, "messages": []}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        events = (await answer.read()).decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event[6:])["choices"][0] for event in events[:-1]]
    assert [choice["delta"].get("content") for choice in choices] == ["the key is ", "sk-", None]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "content_filter"]
    await asyncio.wait_for(house.replicas[0].cancelled.wait(), 60)


async def test_an_event_that_nobody_ended_is_checked_too(make_house: MakeHouse) -> None:
    house = await make_house("says_secret_at_the_end")
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    said = await house.stream()
    assert b"sk-123" not in said and b"content_filter" in said


async def test_a_whole_answer_is_cut_off_where_a_guardrail_is_hit(make_house: MakeHouse) -> None:
    house = await make_house("says_secret")
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    _, document = await post(house, messages=[])
    [choice] = document["choices"]
    assert choice["message"] == {"role": "assistant", "content": "the key is "}
    assert choice["finish_reason"] == "content_filter"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole answer"])
async def test_an_answer_may_have_so_many_characters_and_no_more(
    make_house: MakeHouse, stream: bool
) -> None:
    house = await make_house("says_secret")
    rail = {"name": "brief", "stage": "Output", "maxChars": 12}
    house.serve(*house.replicas, model=model(guardrails=[rail]))
    body = {"model": "tiny", "stream": stream, "messages": []}
    async with house.client.post(house.url + CHAT, json=body) as answer:
        text = (await answer.read()).decode()
    assert "content_filter" in text and "so keep it" not in text
    assert "the key is " in text


async def test_an_answer_without_a_hit_passes_as_it_came(make_house: MakeHouse) -> None:
    house = await make_house("says_secret")
    house.replicas[0].may_continue.set()
    plain = [(await post(house, messages=[]))[1], await house.stream()]
    house.serve(*house.replicas, model=model(guardrails=[{**OUT, "deny": ["nothing"]}]))
    assert [(await post(house, messages=[]))[1], await house.stream()] == plain


async def test_a_replica_lost_in_the_middle_is_still_said_to_be(make_house: MakeHouse) -> None:
    house = await make_house(["die_mid_stream", "die_mid_json"])
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    assert b'"replica_lost"' in await house.stream()
    status, document = await post(house, messages=[])
    assert (status, document["error"]["code"]) == (500, "replica_lost")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole answer"])
async def test_a_replica_lost_before_anything_could_pass_is_said_to_be(
    make_house: MakeHouse, stream: bool
) -> None:
    house = await make_house(["die_mid_event" if stream else "die_mid_json"])
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    status, document = await post(house, messages=[], stream=stream)
    assert (status, document["error"]["code"]) == (500, "replica_lost")
    assert house.sample("mizzen_gateway_cut_streams_total") == 1


async def test_a_client_that_leaves_before_anything_could_pass_stops_the_replica(
    make_house: MakeHouse,
) -> None:
    house = await make_house(["stall_mid_event"])
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    asking = asyncio.create_task(house.stream())
    await until(lambda: house.sample("mizzen_gateway_time_to_first_byte_seconds_count"))
    asking.cancel()
    await asyncio.wait_for(house.replicas[0].cancelled.wait(), 60)


LOGPROBS: dict[str, tuple[str, dict[str, object]]] = {
    "chat": (CHAT, {"messages": [], "logprobs": True, "top_logprobs": 2}),
    "completion": ("/v1/completions", {"prompt": "x", "logprobs": 0}),
}


@pytest.mark.parametrize(("path", "fields"), LOGPROBS.values(), ids=LOGPROBS)
async def test_where_a_stream_is_checked_its_tokens_do_not_come_before_its_text(
    make_house: MakeHouse, path: str, fields: dict[str, object]
) -> None:
    house = await make_house("says_secret")
    house.replicas[0].may_continue.set()
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    status, document = await post(house, path, stream=True, **fields)
    assert (status, document["error"]["code"]) == (400, "content_filter")
    assert "'logprobs' cannot be checked in a stream" in document["error"]["message"]
    assert not house.replicas[0].seen
    whole, _ = await post(house, path, **fields)
    body = {"model": "tiny", "stream": True, **fields, "logprobs": None}
    async with house.client.post(house.url + path, json=body) as answer:
        assert (whole, answer.status) == (200, 200)


@pytest.mark.parametrize("tokens", [0, "0"])
@pytest.mark.parametrize("scores", [{"prompt_logprobs": 0}, {"prompt_samples": 1}])
async def test_where_answers_are_checked_no_scores_are_given(
    make_house: MakeHouse, tokens: object, scores: dict[str, object]
) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(guardrails=[OUT]))
    status, document = await post(house, "/v1/completions", prompt="x", max_tokens=tokens, **scores)
    assert (status, document["error"]["code"]) == (400, "content_filter")
    assert "'no-keys-out'" in document["error"]["message"]
    assert "leave out 'prompt_logprobs' and" in document["error"]["message"]
    assert not house.replicas[0].seen


async def test_the_real_runtime_answers_a_template_and_is_cut_off_by_a_guardrail(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    async with running_tiny_model(tmp_path, served_model_name="tiny") as running:
        house = await make_house(upstream=[f"tiny={running.url}"])
        template = {"id": "say", "messages": [{"role": "system", "content": "{{word}}"}]}
        # Whatever is drawn, were it a new line.
        denied = {**OUT, "deny": [r"[\s\S]"]}
        served = model(prompts=[template], guardrails=[denied])
        house.serve(model=served)
        house.gateway.directory.put_slice(
            ("team", "tiny-slice"),
            deployment=served.key,
            endpoints=house.gateway.directory.endpoints(("local", "tiny")),
        )
        prompt = {"id": "say", "variables": {"word": "a"}}
        fields = {"max_tokens": 8, "ignore_eos": True, "messages": said("x"), "prompt": prompt}
        status, document = await post(house, **{"model": "team/tiny", **fields})
        assert status == 200, document
        [choice] = document["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "content_filter")
        assert document["usage"]["prompt_tokens"] > 0
