"""Prompt templates and guardrails as an LLMDeployment has them, through a real gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mizzen.operator.crds.front import Guardrail, PromptTemplate
from mizzen.runtime.gateway import guardrails as rules
from tests.fixtures.gateway_house import CHAT, MODEL, MakeHouse, open_houses
from tests.fixtures.guarded_model import model, post, said


@pytest.fixture
async def make_house() -> AsyncIterator[MakeHouse]:
    async with open_houses() as make:
        yield make


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


def calling(arguments: object, **fields: str) -> dict[str, Any]:
    """Return a chat in which a tool was called."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"type": "function", "function": {"name": "f", "arguments": text}, **fields}
    return {"messages": [{"role": "assistant", "tool_calls": [call]}]}


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
    "the name of a tool's property": (
        CHAT,
        {"tools": [{"function": {"parameters": {"properties": {"sk-1": {"type": "string"}}}}}]},
    ),
    "a definition's name deep in a tool's schema": (
        CHAT,
        {"tools": [{"function": {"parameters": {"$defs": {"x": {"properties": {"sk-1": {}}}}}}}]},
    ),
    "a field of a tool that the API does not have": (
        CHAT,
        {"tools": [{"function": {"role": "sk-1"}}]},
    ),
    "a word a tool's schema does not have": (
        CHAT,
        {"tools": [{"function": {"parameters": {"x-sk-1": True}}}]},
    ),
    "an earlier call's id": (CHAT, calling({}, id="sk-1")),
    "an argument of an earlier call": (CHAT, calling({"key": "sk-1"})),
    "an argument's name": (CHAT, calling({"sk-1": 1})),
    "an argument written in numbers of its letters": (
        CHAT,
        calling(r'{"key": "\u0073\u006b-1"}'),
    ),
    "arguments that are no JSON": (CHAT, calling("sk-1")),
    "a property an answer must have": (
        CHAT,
        {"response_format": {"json_schema": {"schema": {"properties": {"sk-1": {}}}}}},
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


async def test_what_is_redacted_in_a_tool_leaves_the_rest_of_its_schema_as_it_was(
    make_house: MakeHouse,
) -> None:
    house = await make_house([])
    rail = {**KEYS, "deny": ["sk-[0-9]+", "string", "properties", "411111"], "action": "Redact"}
    house.serve(*house.replicas, model=model(guardrails=[rail]))
    schema = {"type": "object", "properties": {"sk-1": {"type": "string", "enum": ["a string"]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    call = calling(r'{"\u0073k-1": "a", "card": 411111, "n": 5, "is": true}')
    status, _ = await post(house, tools=tools, **call)
    assert status == 200
    sent = json.loads(house.replicas[0].bodies[0])
    [tool] = sent["tools"]
    assert tool["type"] == "function"
    assert tool["function"]["parameters"] == {
        "type": "object",
        "properties": {"[redacted]": {"type": "string", "enum": ["a [redacted]"]}},
    }
    [called] = sent["messages"][0]["tool_calls"]
    arguments = json.loads(called["function"]["arguments"])
    assert arguments == {"[redacted]": "a", "card": "[redacted]", "n": 5, "is": True}


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
