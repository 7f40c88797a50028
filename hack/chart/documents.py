"""values.yaml, values.schema.json and the README's table, from the model of the values."""

from __future__ import annotations

import json
from collections.abc import Iterator

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hack.chart.values import ChartValues, ResourceAmounts

HEADER = "# Generated from hack/chart/values.py by `make chart`; change the model, not this file.\n"
_WIDTH = 100


def values_yaml() -> str:
    """Return values.yaml: every default, with what it means above it."""
    return HEADER + "\n" + "\n".join(_lines(ChartValues(), depth=0)) + "\n"


def schema_json() -> str:
    """Return the JSON schema Helm checks values with."""
    schema = _inlined(ChartValues.model_json_schema(by_alias=True))
    document: dict[str, object] = {"$schema": "http://json-schema.org/draft-07/schema#"}
    properties = schema["properties"]
    assert isinstance(properties, dict)
    # Helm puts `global` into the values of every chart.
    properties["global"] = {"type": "object"}
    return json.dumps(document | schema, indent=2) + "\n"


def values_table() -> str:
    """Return a Markdown table of all values."""
    rows = ["| Value | Default | What it does |", "|---|---|---|"]
    for path, field, default in _leaves(ChartValues(), ""):
        text = (field.description or "").replace("|", "\\|")
        rows.append(f"| `{path}` | `{json.dumps(default)}` | {text} |")
    return "\n".join(rows) + "\n"


def leaf_paths() -> list[str]:
    """Return the path of every value that is not a table of values."""
    return [path for path, _, _ in _leaves(ChartValues(), "")]


def _is_table(value: object) -> bool:
    return isinstance(value, BaseModel) and not isinstance(value, ResourceAmounts)


def _leaves(model: BaseModel, prefix: str) -> Iterator[tuple[str, FieldInfo, object]]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        path = prefix + (field.alias or name)
        if _is_table(value):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, field, _plain(value)


def _lines(model: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        key = field.alias or name
        if depth == 0 and name != next(iter(type(model).model_fields)):
            yield ""
        yield from _comment(field.description or "", indent)
        if _is_table(value):
            yield f"{indent}{key}:"
            yield from _lines(value, depth + 1)
        else:
            text = yaml.safe_dump({key: _plain(value)}, sort_keys=False, width=_WIDTH)
            yield from (indent + line for line in text.rstrip("\n").splitlines())


def _comment(text: str, indent: str) -> Iterator[str]:
    line = f"{indent}#"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH:
            yield line
            line = f"{indent}#"
        line += f" {word}"
    yield line


def _plain(value: object) -> object:
    return value.model_dump(by_alias=True) if isinstance(value, BaseModel) else value


def _inlined(schema: dict[str, object]) -> dict[str, object]:
    """Replace references by what they name: shorter to read in Helm's messages."""
    definitions = schema.pop("$defs", {})
    assert isinstance(definitions, dict)

    def resolve(node: object) -> object:
        if isinstance(node, list):
            return [resolve(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            target = definitions[str(node["$ref"]).removeprefix("#/$defs/")]
            own = {key: value for key, value in node.items() if key != "$ref"}
            return resolve({**target, **own})
        # Titles repeat the key; defaults are in values.yaml. A property may bear either name.
        return {
            key: {name: resolve(entry) for name, entry in value.items()}
            if key == "properties" and isinstance(value, dict)
            else resolve(value)
            for key, value in node.items()
            if key not in ("title", "default")
        }

    resolved = resolve(schema)
    assert isinstance(resolved, dict)
    return resolved
