"""Prompt templates of a model: a chat names one, and its messages come first. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mizzen.runtime.gateway.errors import BadBodyError

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_-]*)\s*\}\}")
_CHAT = "/v1/chat/completions"
_FIELDS = frozenset(("id", "variables"))


class BadPromptError(BadBodyError):
    """The template that is asked for cannot be applied."""

    param = "prompt"


@dataclass(frozen=True, slots=True)
class Template:
    """Messages with places for variables, as pairs of role and content."""

    id: str
    messages: tuple[tuple[str, str], ...]

    def variables(self) -> set[str]:
        """Return the names it has places for."""
        return {name for _, content in self.messages for name in _VARIABLE.findall(content)}

    def filled(self, values: Mapping[str, str]) -> list[dict[str, object]]:
        """Return its messages; a value is text, whatever braces it has."""
        return [
            {"role": role, "content": _VARIABLE.sub(lambda found: values[found[1]], content)}
            for role, content in self.messages
        ]


def apply_prompt(
    document: dict[str, object], templates: Sequence[Template], *, path: str
) -> dict[str, object]:
    """Return the request with the template it asks for, itself where it asks for none.

    Raises:
        BadPromptError: it asks for what there is not; the message names what there is.
    """
    prompt = document.get("prompt")
    if not isinstance(prompt, dict):
        return document
    if path != _CHAT:
        raise BadPromptError(f"A prompt template is for chats: send it to {_CHAT}.")
    template = _named(prompt.get("id"), templates)
    if unknown := sorted(prompt.keys() - _FIELDS):
        raise BadPromptError(f"Unknown field {unknown[0]!r}; a prompt has id and variables.")
    messages = document.get("messages", [])
    if not isinstance(messages, list):
        raise BadPromptError("The field 'messages' must be a list.")
    filled = template.filled(_values(template, prompt.get("variables")))
    rest = {name: value for name, value in document.items() if name != "prompt"}
    return {**rest, "messages": [*filled, *messages]}


def _named(wanted: object, templates: Sequence[Template]) -> Template:
    for template in templates:
        if template.id == wanted:
            return template
    known = ", ".join(template.id for template in templates) or "none"
    raise BadPromptError(f"There is no prompt {str(wanted)[:100]!r}; this model has: {known}.")


def _values(template: Template, given: object) -> dict[str, str]:
    values = {} if given is None else given
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise BadPromptError("The field 'prompt.variables' must be strings by name.")
    wanted = template.variables()
    if missing := sorted(wanted - values.keys()):
        raise BadPromptError(f"The prompt {template.id!r} also needs {', '.join(missing)}.")
    if unknown := sorted(values.keys() - wanted):
        raise BadPromptError(f"The prompt {template.id!r} has no {', '.join(unknown)[:200]}.")
    return values
