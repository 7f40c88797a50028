"""Renders a model's chat template. A template is data from the checkpoint, so it runs sandboxed."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mizzen.runtime.engine.api import Message
from mizzen.runtime.engine.errors import InvalidRequestError


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, with which some templates mark the assistant's words."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Keep the block's body, drop the mark."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Return the conversation as text.

    Raises:
        InvalidRequestError: the template refuses these messages, or is itself broken.
    """
    turns = [dict(message) for message in messages]
    if not knows_tools(template):
        turns, tools = _with_tools_told(turns, tools), None
    try:
        return _compile(template).render(
            messages=turns,
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            **(special_tokens or {}),
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InvalidRequestError(f"The chat template refuses the messages: {error}") from error


def knows_tools(template: str) -> bool:
    """Whether the template itself tells the model about its tools."""
    return "tools" in template


# What Qwen's templates say; Hermes models and their descendants were trained on the same words.
_TOOL_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def _with_tools_told(
    turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """Put tools, calls and their results into words, for a template that knows none of them."""
    told = [_in_words(turn) for turn in turns]
    if tools:
        prompt = _TOOL_PROMPT.format(tools="\n".join(_to_json(tool) for tool in tools))
        if told and told[0]["role"] == "system":
            prompt = f"{told.pop(0)['content']}\n\n{prompt}"
        told.insert(0, {"role": "system", "content": prompt})
    return told


def _in_words(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["role"] == "tool":
        content = f"<tool_response>\n{turn['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    calls = [
        f"<tool_call>\n{_to_json(call['function'])}\n</tool_call>"
        for call in turn.get("tool_calls", ())
    ]
    return (
        {**turn, "content": "\n".join(filter(None, [turn["content"], *calls]))} if calls else turn
    )


@lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    # Jinja's own filter escapes <, > and &, which the model never saw in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
