"""Tool calls: what clients offer, the grammar that forces a call, and reading calls from text.

Models write a call as JSON with a name and its arguments: between <tool_call> tags (Hermes, Qwen)
or bare (Llama, Mistral, whose own marks are special tokens and never reach the text).
"""

import json
import re
import uuid
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mizzen.runtime.engine.api import JSON_ON_ONE_LINE, Grammar
from mizzen.runtime.engine.detokenizer import overlap

Delta = dict[str, Any]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_START = r'[\[\s]*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
_HEAD = re.compile(
    _START + r'"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_NO_CALL = re.compile(_START + r'"(?!(?:type|name|arguments|parameters)"|[a-z]*$)')
_DECODER = json.JSONDecoder()


class Function(BaseModel):
    """What a tool does, and the schema of its arguments."""

    model_config = ConfigDict(extra="ignore")

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: Function


class _Named(BaseModel):
    name: ToolName


class NamedChoice(BaseModel):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: _Named


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


def forced_calls(tools: Collection[Tool], *, in_tags: bool, parallel: bool) -> Grammar:
    """Return the grammar of one call of these tools, or of several where `parallel`."""
    rules, key = [], "arguments" if in_tags else "parameters"
    for index, tool in enumerate(tools):
        head = json.dumps(f'{{"name": "{tool.function.name}", "{key}": ')
        layout = {"x-guidance": JSON_ON_ONE_LINE}
        schema = json.dumps((tool.function.parameters or _NO_ARGUMENTS) | layout)
        rules += [f'call{index}: {head} args{index} "}}"', f"args{index}: %json {schema}"]
    body = " | ".join(f"call{index}" for index in range(len(tools)))
    if not in_tags:
        return Grammar("lark", "\n".join([f"start: {body}", *rules]))
    start = 'start: call ("\\n" call)*' if parallel else "start: call"
    call = f"call: {json.dumps(OPEN)} /\\n/ ({body}) /\\n/ {json.dumps(CLOSE)}"
    return Grammar("lark", "\n".join([start, call, *rules]))


class ToolReader:
    """Splits an answer, as it comes, into what is said and what is called.

    Yields OpenAI deltas. A call's arguments are passed on as they are written; text that may turn
    out to be a call is held back until that is known.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        """Read calls of these tools: all there are, or only the first."""
        self._names = names
        self._parallel = parallel
        self._held = ""  # not decided yet
        self._arguments = ""  # of the call that is being written
        self._in_tags = False
        self._calls = 0
        self._out: list[Delta] = []
        self._step: Callable[[], bool] = self._begin

    @property
    def has_calls(self) -> bool:
        """Whether a call was read."""
        return self._calls > 0

    def push(self, text: str) -> list[Delta]:
        """Return what became certain with this text."""
        self._held += text
        while self._step():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[Delta]:
        """Return what was held back; the answer has ended."""
        if self._step == self._head and not self._read_whole(self._held):
            self._say((OPEN if self._in_tags else "") + self._held)
        elif self._step in (self._begin, self._text) and not (self._calls and self._held.isspace()):
            self._say(self._held)
        self._held, out, self._out = "", self._out, []
        return out

    # Each step looks at what is held and returns whether another one should look again.

    def _begin(self) -> bool:
        """Nothing but blanks so far: bare JSON can only begin here."""
        if not (first := self._held.lstrip()):
            return False
        self._in_tags = first[0] not in "{["
        self._step = self._text if self._in_tags else self._head
        return True

    def _text(self) -> bool:
        before, tag, after = self._held.partition(OPEN)
        if not tag:
            # Blanks too wait for what follows them: before a call they say nothing.
            sure = before[: len(before) - overlap(before, OPEN)].rstrip()
            self._say(sure)
            self._held = before[len(sure) :]
            return False
        self._say(before.rstrip())
        self._held, self._step = after, self._head
        return True

    def _head(self) -> bool:
        """In a call, before its arguments."""
        if found := _HEAD.match(self._held):
            name = found[1]
            if self._in_tags or name in self._names:
                self._call(name)
                self._held, self._arguments = self._held[found.end() :], ""
                self._step = self._body
                return True
        elif self._in_tags and CLOSE in self._held:
            whole, _, rest = self._held.partition(CLOSE)
            if not self._read_whole(whole):
                self._say(f"{OPEN}{whole}{CLOSE}")
            self._held, self._step = rest, self._text
            return True
        if not self._in_tags and (found or _NO_CALL.match(self._held)):
            self._in_tags, self._step = True, self._text  # other JSON: an answer like any other
            return True
        return False

    def _body(self) -> bool:
        """In a call's arguments."""
        sent = len(self._arguments)
        self._arguments, new, self._held = self._arguments + self._held, self._held, ""
        end = _end_of_object(self._arguments) if "}" in new else None
        if end is not None:
            self._arguments, self._held = self._arguments[:end], self._arguments[end:]
            self._step = self._tail
        self._pass_arguments(self._arguments[sent:])
        return end is not None

    def _tail(self) -> bool:
        """Behind a call's arguments: its closing tag, or another bare call."""
        mark = CLOSE if self._in_tags else "{"
        at = self._held.find(mark)
        if at < 0:
            return False
        self._held = self._held[at + len(CLOSE) :] if self._in_tags else self._held[at:]
        self._step = self._text if self._in_tags else self._head
        return True

    def _read_whole(self, text: str) -> bool:
        """Read calls whose keys come in another order; return whether that is what it was."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = [
            _name_and_arguments(call) for call in (found if isinstance(found, list) else [found])
        ]
        known = [call for call in calls if call and (self._in_tags or call[0] in self._names)]
        if not known or len(known) < len(calls):
            return False
        for name, arguments in known:
            self._call(name)
            self._pass_arguments(arguments)
        return True

    def _say(self, text: str) -> None:
        if text:
            self._out.append({"content": text})

    def _call(self, name: str) -> None:
        self._calls += 1
        if not self._is_wanted:
            return
        function = {"name": name, "arguments": ""}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        self._out.append({"tool_calls": [{"index": self._calls - 1, **call}]})

    @property
    def _is_wanted(self) -> bool:
        return self._parallel or self._calls == 1

    def _pass_arguments(self, text: str) -> None:
        if text and self._is_wanted:
            call = {"index": self._calls - 1, "function": {"arguments": text}}
            self._out.append({"tool_calls": [call]})


def read_tools(
    text: str, names: Collection[str], *, parallel: bool = True
) -> tuple[str, list[Delta]]:
    """Return what a whole answer says, and its calls."""
    reader = ToolReader(names, parallel=parallel)
    said, calls = "", list[Delta]()
    for delta in [*reader.push(text), *reader.finish()]:
        said += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({key: part[key] for key in ("id", "type", "function")})
            else:
                calls[-1]["function"]["arguments"] += part["function"]["arguments"]
    return said, calls


def _end_of_object(text: str) -> int | None:
    try:
        return _DECODER.raw_decode(text)[1]
    except (ValueError, RecursionError):
        return None


def _name_and_arguments(call: Any) -> tuple[str, str] | None:
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments)
