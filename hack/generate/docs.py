"""Reference pages of both kinds, from the same schema that the API server enforces."""

from collections.abc import Iterator
from typing import Any

from mizzen.operator.crds.common import API_VERSION
from mizzen.operator.crds.schema import ALL, Crd, build_crd

HEADER = "<!-- Generated from operator/crds by `make docs`; change the models, not this page. -->"

Schema = dict[str, Any]


def files() -> dict[str, str]:
    """Return path and content of every page."""
    return {f"docs/reference/{crd.kind.lower()}.md": page(crd) for crd in ALL}


def page(crd: Crd) -> str:
    """Return one kind's page."""
    version = build_crd(crd)["spec"]["versions"][0]
    schema = version["schema"]["openAPIV3Schema"]
    return "\n".join(
        [
            HEADER,
            f"# {crd.kind}",
            "",
            schema["description"],
            "",
            f"`apiVersion: {API_VERSION}`, `kind: {crd.kind}`, short name `{crd.short_name}`, "
            "category `llm`. `kubectl explain " + crd.kind.lower() + ".spec` shows the same.",
            "",
            "## spec",
            "",
            *_table(schema["properties"]["spec"], "spec"),
            "",
            "## Rules",
            "",
            "What the API server refuses, with the words it uses:",
            "",
            *(f"- `{path}`: {message}" for path, message in _rules(schema, "")),
            "",
            "## status",
            "",
            "Written by the operator alone.",
            "",
            *_table(schema["properties"]["status"], "status"),
            "",
            "## Columns of `kubectl get`",
            "",
            "| Column | From | Shown |",
            "|---|---|---|",
            *(
                f"| {column['name']} | `{column['jsonPath']}` | "
                f"{'with -o wide' if column.get('priority') else 'always'} |"
                for column in version["additionalPrinterColumns"]
            ),
            "",
        ]
    )


def _table(schema: Schema, path: str) -> list[str]:
    rows = ["| Field | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, member, is_required in _members(schema, path):
        rows.append(
            f"| `{name}` | {_type(member)} | {_default(member, is_required)} | "
            f"{member.get('description', '').replace('|', chr(92) + '|')} |"
        )
    return rows


def _members(schema: Schema, path: str) -> Iterator[tuple[str, Schema, bool]]:
    required = schema.get("required", ())
    for name, member in schema.get("properties", {}).items():
        here = f"{path}.{name}"
        yield here, member, name in required
        yield from _members(member, here)
        if "items" in member:
            yield from _members(member["items"], f"{here}[]")


def _type(member: Schema) -> str:
    if "enum" in member:
        return " or ".join(f"`{value}`" if value != "" else '`""`' for value in member["enum"])
    if member.get("x-kubernetes-int-or-string"):
        return "quantity"
    if member.get("type") == "array":
        return f"list of {_type(member['items'])}"
    if "additionalProperties" in member:
        return f"map to {_type(member['additionalProperties'])}"
    return str(member.get("type", "object")) + _bounds(member)


def _bounds(member: Schema) -> str:
    low, high = member.get("minimum"), member.get("maximum")
    words = []
    if low is not None:
        words.append(f"{'>' if member.get('exclusiveMinimum') else '>='} {low}")
    if high is not None:
        words.append(f"{'<' if member.get('exclusiveMaximum') else '<='} {high}")
    return f", {', '.join(words)}" if words else ""


def _default(member: Schema, is_required: bool) -> str:
    if is_required:
        return "required"
    default = member.get("default")
    return "" if default is None or isinstance(default, dict) else f"`{default}`"


def _rules(schema: Schema, path: str) -> Iterator[tuple[str, str]]:
    for rule in schema.get("x-kubernetes-validations", ()):
        yield path or "the resource", rule["message"]
    for name, member in schema.get("properties", {}).items():
        yield from _rules(member, f"{path}.{name}".removeprefix("."))
    if "items" in schema:
        yield from _rules(schema["items"], f"{path}[]")
