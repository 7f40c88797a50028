"""Prompt templates and guardrails as an LLMDeployment has them, through a real gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mizzen.operator.crds.front import Guardrail, PromptTemplate
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.runtime.gateway import guardrails as rules
from mizzen.runtime.gateway.directory import ServedModel
from mizzen.runtime.gateway.sinks import parse_model
from tests.fixtures.gateway_house import CHAT, MODEL, House, MakeHouse, open_houses, until
from tests.fixtures.runtime_server import running_tiny_model


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


def model(**spec: Any) -> ServedModel:
    """Return what the gateway knows of a deployment that the API server took."""
    fields = {"model": {"source": "pvc://models/tiny"}, **spec}
    document = LLMDeploymentSpec.parse(fields).to_api()
    return parse_model(
        {"metadata": {"namespace": "team", "name": "tiny"}, "spec": document, "status": {}}
    )


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def post(house: House, path: str = CHAT, **fields: Any) -> tuple[int, Any]:
    body = {"model": "tiny", **fields}
    async with house.client.post(house.url + path, json=body) as answer:
        return answer.status, json.loads(await answer.read())


# Templates.

TRANSLATE = {
    "id": "translate",
    "messages": [
        {"role": "system", "content": "Translate to {{language}}, {{ tone }}."},
        {"role": "assistant", "content": "Gladly."},
    ],
}


async def test_a_template_s_messages_come_before_those_of_the_chat(make_house: MakeHouse) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(prompts=[TRANSLATE]))
    variables = {"language": "Welsh {{tone}}", "tone": "gently"}
    prompt = {"id": "translate", "variables": variables}
    status, _ = await post(house, messages=said("Good morning"), prompt=prompt)
    assert status == 200
    sent = json.loads(house.replicas[0].bodies[0])
    assert "prompt" not in sent
    assert [(one["role"], one["content"]) for one in sent["messages"]] == [
        ("system", "Translate to Welsh {{tone}}, gently."),
        ("assistant", "Gladly."),
        ("user", "Good morning"),
    ]


BOTH = {"language": "a", "tone": "b"}
BAD_PROMPTS = {
    "a template there is not": (CHAT, {"id": "sum"}, "this model has: translate."),
    "variables that are missing": (CHAT, {"id": "translate"}, "also needs language, tone."),
    "a variable there is not": (
        CHAT,
        {"id": "translate", "variables": {**BOTH, "colour": "c"}},
        "has no colour.",
    ),
    "a variable that is no text": (
        CHAT,
        {"id": "translate", "variables": {"tone": 1}},
        "must be strings by name",
    ),
    "an unknown field": (
        CHAT,
        {"id": "translate", "variables": BOTH, "version": "2"},
        "Unknown field 'version'",
    ),
    "another endpoint": (
        "/v1/completions",
        {"id": "translate", "variables": BOTH},
        "is for chats",
    ),
}


@pytest.mark.parametrize(("path", "prompt", "says"), BAD_PROMPTS.values(), ids=BAD_PROMPTS)
async def test_a_template_that_cannot_be_applied_is_refused_with_what_to_change(
    make_house: MakeHouse, path: str, prompt: dict[str, Any], says: str
) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(prompts=[TRANSLATE]))
    status, document = await post(house, path, prompt=prompt)
    assert (status, document["error"]["param"]) == (400, "prompt")
    assert says in document["error"]["message"]
    assert not house.replicas[0].seen


# What goes in.

KEYS = {"name": "no-keys", "stage": "Input", "deny": ["sk-[a-z0-9]+", "BEGIN"]}
INPUTS = {
    "a message": (CHAT, {"messages": said("use sk-abc1")}),
    "a part of a message": (CHAT, {"messages": [{"content": [{"text": "x sk-1"}]}]}),
    "a tool's description": (
        CHAT,
        {"tools": [{"function": {"description": "BEGIN"}}], "messages": []},
    ),
    "a variable of a template": (
        CHAT,
        {"prompt": {"id": "translate", "variables": {"language": "sk-1", "tone": "x"}}},
    ),
    "a variable of a template that has a field's name": (
        CHAT,
        {"prompt": {"id": "translate", "variables": {"type": "sk-1"}}},
    ),
    "a property of a tool that has a field's name": (
        CHAT,
        {"tools": [{"function": {"parameters": {"properties": {"id": {"description": "BEGIN"}}}}}]},
    ),
    "a type in a tool's schema": (
        CHAT,
        {"tools": [{"function": {"parameters": {"properties": {"x": {"type": "sk-1"}}}}}]},
    ),
    "a prompt": ("/v1/completions", {"prompt": ["fine", "sk-zz"]}),
    "a prompt whose tokens are to be scored": (
        "/v1/completions",
        {"prompt": "sk-zz", "max_tokens": 0, "prompt_logprobs": 0},
    ),
    "a text to embed": ("/v1/embeddings", {"input": "sk-zz"}),
}


@pytest.mark.parametrize(("path", "fields"), INPUTS.values(), ids=INPUTS)
async def test_a_pattern_is_found_wherever_a_request_has_text(
    make_house: MakeHouse, path: str, fields: dict[str, Any]
) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(prompts=[TRANSLATE], guardrails=[KEYS]))
    status, document = await post(house, path, **fields)
    assert (status, document["error"]["code"]) == (400, "content_filter")
    assert "'no-keys'" in document["error"]["message"]
    assert not house.replicas[0].seen
    name = "mizzen_gateway_guardrail_hits_total"
    assert house.sample(name, guardrail="no-keys") == 1


async def test_what_is_to_be_redacted_does_not_reach_the_replica(make_house: MakeHouse) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(guardrails=[{**KEYS, "action": "Redact"}]))
    tools = [{"type": "function", "function": {"parameters": {"id": {"title": "sk-3"}}}}]
    status, _ = await post(house, messages=said("a sk-1 b sk-2 \ud800 c"), tools=tools)
    assert status == 200
    sent = json.loads(house.replicas[0].bodies[0])
    assert sent["messages"] == said("a [redacted] b [redacted] ? c")
    assert sent["tools"][0]["function"]["parameters"] == {"id": {"title": "[redacted]"}}
    assert sent["model"] == "tiny"


async def test_a_variable_is_redacted_whatever_its_name(make_house: MakeHouse) -> None:
    house = await make_house([])
    template = {"id": "say", "messages": [{"role": "user", "content": "{{type}}"}]}
    served = model(prompts=[template], guardrails=[{**KEYS, "action": "Redact"}])
    house.serve(*house.replicas, model=served)
    status, _ = await post(house, prompt={"id": "say", "variables": {"type": "sk-1"}})
    assert status == 200
    assert json.loads(house.replicas[0].bodies[0])["messages"] == said("[redacted]")


NO_TEXTS = {
    "tokens": [[1, 2]],
    "tokens as fractions": [1.0, 2.0],
    "tokens as strings": [["15", "27"]],
    "a token beside a text": ["fine", 15],
    "a truth": True,
}


@pytest.mark.parametrize("action", ["Refuse", "Redact"])
@pytest.mark.parametrize("prompt", NO_TEXTS.values(), ids=NO_TEXTS)
async def test_what_is_no_text_cannot_be_checked_and_is_refused(
    make_house: MakeHouse, action: str, prompt: Any
) -> None:
    house = await make_house([])
    house.serve(*house.replicas, model=model(guardrails=[{**KEYS, "action": action}]))
    asked = {"/v1/completions": {"prompt": prompt}, "/v1/embeddings": {"input": prompt}}
    for path, fields in asked.items():
        status, document = await post(house, path, **fields)
        assert status == 400
        assert "must be text, not tokens: a string or a list" in document["error"]["message"]
    assert not house.replicas[0].seen


async def test_a_request_may_have_so_many_characters_and_no_more(make_house: MakeHouse) -> None:
    house = await make_house([])
    rail = {"name": "short", "stage": "Input", "maxChars": 10}
    house.serve(*house.replicas, model=model(guardrails=[rail]))
    assert (await post(house, messages=said("x" * 10)))[0] == 200
    status, document = await post(house, messages=[*said("x" * 5), *said("x" * 6)])
    assert status == 400
    assert "it has 11 characters, and 10 are allowed" in document["error"]["message"]


# What comes out.

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


# A check that fails.


@pytest.mark.parametrize("stage", ["Input", "Output"])
async def test_while_a_check_fails_nothing_is_answered_unless_the_field_says_so(
    make_house: MakeHouse, stage: str
) -> None:
    house = await make_house([])
    broken = {"name": "broken", "stage": stage, "deny": ["(?=x)"]}
    house.serve(*house.replicas, model=model(guardrails=[broken]))
    status, document = await post(house, messages=said("x"))
    assert (status, document["error"]["code"]) == (500, "guardrail_failed")
    assert "'broken'" in document["error"]["message"]
    assert "invalid perl operator" in document["error"]["message"]
    house.serve(*house.replicas, model=model(guardrails=[{**broken, "onError": "Allow"}]))
    assert (await post(house, messages=said("x")))[0] == 200


async def test_a_pattern_that_is_wrong_is_said_once_in_the_log(
    make_house: MakeHouse, caplog: pytest.LogCaptureFixture
) -> None:
    house = await make_house("says_secret")
    house.replicas[0].may_continue.set()
    rail = {"name": "broken", "stage": "Output", "deny": ["(?=once)"], "onError": "Allow"}
    house.serve(*house.replicas, model=model(guardrails=[rail]))
    for _ in range(2):
        assert b"so keep it" in await house.stream()
    assert caplog.text.count("pattern '(?=once)' is not RE2's") == 1


class DeepGuardrail(rules.Guardrail):
    """Finds every text too deep, as some are from some depth on, another with each Python."""

    def first_hit(self, text: str) -> int | None:
        raise RecursionError


async def test_what_is_nested_too_deeply_to_be_checked_is_the_client_s_mistake(
    make_house: MakeHouse,
) -> None:
    house = await make_house([])
    rail = DeepGuardrail("deep", is_output=False)
    house.serve(*house.replicas, model=replace(MODEL, guardrails=(rail,)))
    status, document = await post(house, messages=said("x"))
    assert status == 400
    assert "nested too deeply to be checked" in document["error"]["message"]
    assert not house.replicas[0].seen


def test_the_fields_that_make_no_sense_together_are_refused_by_the_api() -> None:
    messages = [rule["message"] for rule in Guardrail.rules]
    assert "A guardrail needs deny or maxChars." in messages
    assert "Redact is for deny in stage Input; use Refuse." in messages
    assert PromptTemplate.parse(TRANSLATE).to_api() == TRANSLATE


# With the real engine.


async def test_the_real_runtime_answers_a_template_and_is_cut_off_by_a_guardrail(
    make_house: MakeHouse, tmp_path: Path
) -> None:
    async with running_tiny_model(tmp_path, served_model_name="tiny") as running:
        house = await make_house(upstream=[f"tiny={running.url}"])
        served = model(prompts=[TRANSLATE], guardrails=[{**OUT, "deny": ["."]}])
        house.serve(model=served)
        house.gateway.directory.put_slice(
            ("team", "tiny-slice"),
            deployment=served.key,
            endpoints=house.gateway.directory.endpoints(("local", "tiny")),
        )
        prompt = {"id": "translate", "variables": BOTH}
        fields = {"max_tokens": 8, "ignore_eos": True, "messages": said("x"), "prompt": prompt}
        status, document = await post(house, **{"model": "team/tiny", **fields})
        assert status == 200, document
        [choice] = document["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "content_filter")
        assert document["usage"]["prompt_tokens"] > 0
