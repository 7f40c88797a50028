"""Where a document has text that a model reads or has written. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

See = Callable[[str], str]
"""Is shown a text and returns what is to stand in its place."""


class Place(Enum):
    """A part of a document: it decides what is text there, and what only a name."""

    ANSWER = auto()
    REQUEST = auto()
    VARIABLES = auto()  # of a template: names of the client's choice
    SCHEMA = auto()  # of tools, calls and answers: models are shown its names and numbers too


_PLACES = {
    "variables": Place.VARIABLES,
    **dict.fromkeys(
        ("tools", "tool_calls", "response_format", "structured_outputs", "guided_json"),
        Place.SCHEMA,
    ),
}
# What a guardrail would break by blacking it out, and no client can choose.
_NAMES = frozenset(("model", "role", "type", "id"))
_VALUES = "function json_schema json_object text object array string number integer boolean null"
_TYPES = frozenset(_VALUES.split())
# Of the API and of JSON Schema; any other name in a schema is the client's.
_FIELDS = (
    "id type function name description parameters strict arguments json_schema schema json regex "
    "choice grammar properties required items prefixItems additionalProperties patternProperties "
    "anyOf oneOf allOf not if then else enum const default title format pattern examples minimum "
    "maximum exclusiveMinimum exclusiveMaximum multipleOf minLength maxLength minItems maxItems "
    "uniqueItems minProperties maxProperties $ref $defs $id $schema definitions"
)
_WORDS = frozenset(_FIELDS.split())


def texts_of(document: object, place: Place) -> list[str]:
    """Return every text in a document."""
    found: list[str] = []

    def see(text: str) -> str:
        found.append(text)
        return text

    map_texts(document, see, place)
    return found


def map_texts(node: Any, see: See, place: Place) -> Any:
    """Return a document with every text as `see` returns it."""
    if isinstance(node, dict):
        return {
            _name(name, see, place): value
            if _is_name(name, value, place)
            else _value(name, value, see, place)
            for name, value in node.items()
        }
    if isinstance(node, list):
        return [map_texts(value, see, place) for value in node]
    if isinstance(node, str):
        return see(node)
    if place is Place.SCHEMA and isinstance(node, int | float) and not isinstance(node, bool):
        shown = see(str(node))
        return node if shown == str(node) else shown
    return node


def _name(name: str, see: See, place: Place) -> str:
    return see(name) if place is Place.SCHEMA and name not in _WORDS else name


def _value(name: str, value: Any, see: See, place: Place) -> Any:
    if place is Place.REQUEST:
        return map_texts(value, see, _PLACES.get(name, place))
    if place is Place.SCHEMA and name == "arguments" and isinstance(value, str):
        return _arguments(value, see)
    return map_texts(value, see, place)


def _arguments(text: str, see: See) -> str:
    """Show what a call was made with as models read it: JSON can write any letter as a number."""
    try:
        given = json.loads(text)
    except ValueError:
        return see(text)
    mapped = map_texts(given, see, Place.SCHEMA)
    return text if mapped == given else json.dumps(mapped, ensure_ascii=False)


def _is_name(name: str, value: object, place: Place) -> bool:
    if not isinstance(value, str):
        return False
    if place is Place.SCHEMA:
        return name == "type" and value in _TYPES
    return place is not Place.VARIABLES and name in _NAMES
