"""Tools: told to the model, forced by grammar, read from its text, through the openai package."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.runtime.engine.chat_template import render_chat
from mizzen.runtime.server.tools import ToolReader, read_tools
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, running_server, running_tiny_model

NAMES = frozenset({"weather", "now"})
PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
CALL = ("weather", {"city": "Paris"})

# text -> what it says, what it calls
TEXTS: dict[str, tuple[str, str, list[tuple[str, object]]]] = {
    "nothing called": ("It is sunny.", "It is sunny.", []),
    "Hermes and Qwen": (f"<tool_call>\n{PARIS}\n</tool_call>", "", [CALL]),
    "words before a call": (
        f"Let me look.\n<tool_call>{PARIS}</tool_call>",
        "Let me look.",
        [CALL],
    ),
    "two calls": (
        f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n"
        '{"name": "now", "arguments": {}}\n</tool_call>',
        "",
        [CALL, ("now", {})],
    ),
    "Llama": ('{"name": "weather", "parameters": {"city": "Paris"}}', "", [CALL]),
    "Llama with its type": (
        '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}',
        "",
        [CALL],
    ),
    "Mistral": (f'[{PARIS}, {{"name": "now", "arguments": {{}}}}]', "", [CALL, ("now", {})]),
    "another order of keys": (
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>',
        "",
        [CALL],
    ),
    "arguments with braces in a string": (
        '{"name": "weather", "parameters": {"city": "}{\\"Ü"}}',
        "",
        [("weather", {"city": '}{"Ü'})],
    ),
    "arguments as text": (
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [CALL],
    ),
    "JSON that calls nothing": ('{"answer": 42, "more": [1]}', '{"answer": 42, "more": [1]}', []),
    "a list": ("[1, 2, 3]", "[1, 2, 3]", []),
    "a name that is no tool": (
        '{"name": "Anna", "arguments": {"a": 1}}',
        '{"name": "Anna", "arguments": {"a": 1}}',
        [],
    ),
    "broken JSON in tags": ("<tool_call>oh</tool_call> no", "<tool_call>oh</tool_call> no", []),
    "a tag that never ends": ("<tool_call>\nwell", "<tool_call>\nwell", []),
    "half a tag": ("1 <tool", "1 <tool", []),
    "blanks": ("  \n", "  \n", []),
}


def calls_of(calls: list[dict[str, Any]]) -> list[tuple[str, object]]:
    functions = [call["function"] for call in calls]
    return [(each["name"], json.loads(each["arguments"])) for each in functions]


@pytest.mark.parametrize(("text", "said", "called"), TEXTS.values(), ids=TEXTS)
def test_calls_are_read(text: str, said: str, called: list[tuple[str, object]]) -> None:
    found, calls = read_tools(text, NAMES)
    assert (found, calls_of(calls)) == (said, called)
    assert all(call["id"].startswith("call_") for call in calls)


@given(st.data())
def test_a_stream_says_the_same_wherever_it_is_cut(data: st.DataObject) -> None:
    text, said, called = data.draw(st.sampled_from(list(TEXTS.values())))
    reader, found, calls = ToolReader(NAMES), "", list[dict[str, Any]]()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    for delta in [*(d for piece in pieces for d in reader.push(piece)), *reader.finish()]:
        found += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append(part)
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    assert (found, calls_of(calls)) == (said, called)


def test_arguments_are_passed_on_as_they_are_written() -> None:
    reader = ToolReader(NAMES)
    reader.push('<tool_call>{"name": "weather", "arguments": ')
    assert reader.push('{"ci')[-1]["tool_calls"][0]["function"] == {"arguments": '{"ci'}
    assert reader.push('ty": {')[0]["tool_calls"][0]["function"] == {"arguments": 'ty": {'}
    assert reader.push("}}}\n")[0]["tool_calls"][0]["function"] == {"arguments": "}}"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
USER = {"role": "user", "content": "Weather in Paris?"}
PLAIN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def test_a_template_that_knows_no_tools_is_told_in_words() -> None:
    made = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "21 C"},
    ]
    text = render_chat(PLAIN, turns, tools=TOOLS)
    assert text.startswith("[system]Be brief.\n\n# Tools")
    assert '"description": "Weather of a city"' in text
    assert '[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}' in text
    assert text.endswith("[user]<tool_response>\n21 C\n</tool_response>")


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    template = (
        PLAIN + "{{ tools | tojson }}{{ messages[-1].tool_calls[0].function.arguments.city }}"
    )
    made = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [made]}]
    text = render_chat(template, turns, tools=TOOLS)
    assert text == "[assistant]" + json.dumps(TOOLS) + "Rome"


async def test_a_forced_call_is_made_by_a_model_that_knows_nothing(tmp_path: Path) -> None:
    async with (
        running_tiny_model(tmp_path, context=1024) as running,
        client(running) as openai_client,
    ):
        ask = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS[:1]}
        named = {"type": "function", "function": {"name": "weather"}}
        for choice in ("required", named):
            answer = await openai_client.chat.completions.create(
                **ask, tool_choice=choice, parallel_tool_calls=False, n=2
            )
            for each in answer.choices:
                assert (each.finish_reason, each.message.content) == ("tool_calls", None)
                (call,) = each.message.tool_calls
                assert call.function.name == "weather"
                assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
        stream = await openai_client.chat.completions.create(
            **ask, tool_choice="required", parallel_tool_calls=False, stream=True
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
        assert parts[0].function.name == "weather"
        arguments = "".join(part.function.arguments for part in parts)
        assert json.loads(arguments)["city"] in ("Paris", "Rome")
        assert chunks[-1].finish_reason == "tool_calls"
        broken = {"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}
        with pytest.raises(openai.BadRequestError, match="strange"):
            await openai_client.chat.completions.create(
                **ask | {"tools": [broken]}, tool_choice="required"
            )


def client(running: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0)


async def test_a_call_by_choice_reaches_the_client_and_its_result_the_model() -> None:
    fake = FakeEngine(says=f"Let me look.<tool_call>\n{PARIS}\n</tool_call>", model_len=4000)
    async with running_server(fake) as running, client(running) as openai_client:
        ask = {"model": "tiny", "messages": [USER], "tools": TOOLS}
        answer = await openai_client.chat.completions.create(**ask)
        message = answer.choices[0].message
        assert message.content == "Let me look."
        assert message.tool_calls[0].function.arguments == '{"city": "Paris"}'
        assert answer.choices[0].finish_reason == "tool_calls"
        cut = await openai_client.chat.completions.create(**ask, max_tokens=45)
        assert cut.choices[0].finish_reason == "length"
        off = await openai_client.chat.completions.create(**ask, tool_choice="none")
        assert off.choices[0].message.tool_calls is None
        assert "<tool_call>" in off.choices[0].message.content
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "21 C"}
        await openai_client.chat.completions.create(
            model="tiny", messages=[USER, message.model_dump(exclude_none=True), result]
        )


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_no_parallel_calls_means_that_the_first_is_the_only_one(stream: bool) -> None:
    text, _, _ = TEXTS["two calls"]
    fake = FakeEngine(says=text + " Done.", model_len=4000)
    async with running_server(fake) as running, client(running) as openai_client:
        answer = await openai_client.chat.completions.create(
            model="tiny", messages=[USER], tools=TOOLS, parallel_tool_calls=False, stream=stream
        )
        choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    said = [choice.delta if stream else choice.message for choice in choices]
    calls = [call for part in said for call in part.tool_calls or ()]
    assert [call.function.name for call in calls if call.id] == ["weather"]
    assert "".join(call.function.arguments for call in calls) == '{"city": "Paris"}'
    assert "".join(part.content or "" for part in said).strip() == "Done."
    assert choices[-1].finish_reason == "tool_calls"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "forced without tools": ({"tool_choice": "required"}, "tools does not hold"),
    "a name that is not offered": (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tools does not hold",
    ),
    "another form beside it": (
        {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
        "no other beside it",
    ),
    "no function": ({"tools": [{"type": "function"}]}, "tools.0.function"),
    "too many": ({"tools": TOOLS * 100}, "at most 128"),
    "a strange name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "pattern"),
    "arguments that are no object": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}
            ]
        },
        "tool_calls.0.function.arguments",
    ),
}


@pytest.mark.parametrize(("fields", "text"), BAD.values(), ids=BAD)
async def test_a_wrong_tool_request_says_what_to_change(fields: dict[str, Any], text: str) -> None:
    async with running_server(FakeEngine()) as running:
        body = {"model": "tiny", "messages": [USER], **fields}
        answer = await running.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert text in answer.json()["error"]["message"]
