"""From the pydantic models to CustomResourceDefinitions. Pure.

A structural schema has no $ref, no anyOf with null and no numeric exclusive bounds: references are
written out, "or nothing" becomes "not required", exclusive bounds take their OpenAPI 3.0 form.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from mizzen.operator.crds import finetunejob, llmdeployment
from mizzen.operator.crds.common import GROUP, VERSION, ApiModel, Json

# Words of JSON Schema that a structural schema keeps as they are.
_KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "default",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of `kubectl get`; `priority` 1 shows it with -o wide only."""

    name: str
    type: str
    path: str
    description: str
    priority: int = 0

    def to_api(self) -> Json:
        """Return the column's wire form."""
        column: Json = {
            "name": self.name,
            "type": self.type,
            "jsonPath": self.path,
            "description": self.description,
        }
        return column | ({"priority": self.priority} if self.priority else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Crd:
    """What a kind adds to its model."""

    model: type[ApiModel]
    kind: str
    plural: str
    short_name: str
    columns: tuple[Column, ...]
    selectable: tuple[str, ...] = ()
    subresources: Json = field(default_factory=dict)


_READY = '.status.conditions[?(@.type=="Ready")]'
_AGE = Column(
    name="Age", type="date", path=".metadata.creationTimestamp", description="Since its creation."
)
_REASON = Column(
    name="Reason", type="string", path=f"{_READY}.reason", description="Why.", priority=1
)
_MESSAGE = Column(
    name="Message", type="string", path=f"{_READY}.message", description="Details.", priority=1
)

LLMDEPLOYMENT = Crd(
    model=llmdeployment.LLMDeployment,
    kind=llmdeployment.KIND,
    plural=llmdeployment.PLURAL,
    short_name="llmd",
    columns=(
        Column(
            name="Model", type="string", path=".spec.model.source", description="What is served."
        ),
        Column(name="Ready", type="string", path=".status.ready", description="Ready of wanted."),
        Column(name="State", type="string", path=".status.phase", description="State in a word."),
        Column(name="GPUs", type="integer", path=".status.gpus", description="Devices held."),
        Column(name="URL", type="string", path=".status.url", description="Where to ask."),
        _AGE,
        _REASON,
        _MESSAGE,
    ),
    selectable=(".spec.model.source", ".status.phase"),
    subresources={
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        }
    },
)

FINETUNEJOB = Crd(
    model=finetunejob.FineTuneJob,
    kind=finetunejob.KIND,
    plural=finetunejob.PLURAL,
    short_name="ftj",
    columns=(
        Column(name="Method", type="string", path=".spec.method", description="Kind of training."),
        Column(name="Base", type="string", path=".status.baseModel", description="Trained from."),
        Column(name="Phase", type="string", path=".status.phase", description="State in a word."),
        Column(
            name="Step", type="string", path=".status.progress.steps", description="Steps done."
        ),
        Column(
            name="Loss", type="number", path=".status.metrics.loss", description="Training loss."
        ),
        Column(name="ETA", type="string", path=".status.progress.eta", description="Time left."),
        Column(
            name="Restarts", type="integer", path=".status.restarts", description="Crashes so far."
        ),
        Column(
            name="Preempted",
            type="integer",
            path=".status.lending.preemptions",
            description="Times it gave its devices back.",
        ),
        _AGE,
        _REASON,
        _MESSAGE,
    ),
    selectable=(".spec.promotion.deployment", ".spec.baseModel.deployment", ".status.phase"),
)

ALL = (LLMDEPLOYMENT, FINETUNEJOB)


def build_crd(crd: Crd) -> Json:
    """Return the CustomResourceDefinition."""
    version: Json = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [column.to_api() for column in crd.columns],
        "subresources": {"status": {}, **crd.subresources},
        "schema": {"openAPIV3Schema": build_schema(crd.model, crd.kind)},
    }
    if crd.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in crd.selectable]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{crd.plural}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "mizzen"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": crd.kind,
                "listKind": f"{crd.kind}List",
                "plural": crd.plural,
                "singular": crd.kind.lower(),
                "shortNames": [crd.short_name],
                "categories": ["llm"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }


def build_schema(model: type[ApiModel], kind: str) -> Json:
    """Return the structural schema of a whole resource."""
    schema = structural(model)
    schema["properties"] = {
        "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}"},
        "kind": {"type": "string", "description": kind},
        "metadata": {"type": "object"},
        **schema["properties"],
    }
    return schema


def structural(model: type[BaseModel]) -> Json:
    """Return a model's structural schema with its CEL rules."""
    source = model.model_json_schema(by_alias=True)
    return _Converter(source.get("$defs", {}), _rules_by_name(model)).convert(source)


def _rules_by_name(model: type[BaseModel]) -> dict[str, list[Json]]:
    """Return the object rules of this model and of every model below, by the model's title."""
    found: dict[str, list[Json]] = {}
    pending: list[Any] = [model]
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, type) and issubclass(item, ApiModel):
            if item.rules:
                found[item.__name__] = list(item.rules)
            pending += [info.annotation for info in item.model_fields.values()]
        pending += getattr(item, "__args__", ())
    return found


@dataclass(frozen=True, slots=True)
class _Converter:
    """Writes references out, for one root schema."""

    definitions: Json
    rules: dict[str, list[Json]]

    def convert(self, source: Json) -> Json:
        """Return the structural form of one node."""
        node = self._resolve(source)
        result = {word: node[word] for word in _KEPT if word in node and node[word] is not None}
        result |= {word: value for word, value in node.items() if word.startswith("x-kubernetes-")}
        if "description" in result:
            result["description"] = " ".join(str(result["description"]).split())
        if "x-kubernetes-int-or-string" in result:
            result.pop("type", None)
        if "const" in node:
            result["enum"] = [node["const"]]
        self._default(result)
        self._bounds(node, result)
        self._members(node, result)
        return result

    def _resolve(self, source: Json) -> Json:
        """Return the node with its reference and its "or nothing" taken away."""
        choices = source.get("anyOf")
        if choices is not None:
            outer = {key: value for key, value in source.items() if key != "anyOf"}
            some = [choice for choice in choices if choice.get("type") != "null"]
            if len(some) == 1:
                return {**self._resolve(some[0]), **outer}
            return outer  # integer or string: told by x-kubernetes-int-or-string
        if "$ref" in source:
            name = source["$ref"].rpartition("/")[2]
            outer = {key: value for key, value in source.items() if key != "$ref"}
            return {**self._resolve(self.definitions[name]), **outer}
        return source

    def _default(self, result: Json) -> None:
        """Leave out of an object's default what says nothing."""
        if isinstance(default := result.pop("default", None), dict):
            default = _without_nulls(default) or None
        if default is not None:
            result["default"] = default

    def _bounds(self, node: Json, result: Json) -> None:
        for exclusive, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if exclusive in node:
                result[plain], result[exclusive] = node[exclusive], True

    def _members(self, node: Json, result: Json) -> None:
        if "properties" in node:
            result["properties"] = {
                name: self.convert(member) for name, member in node["properties"].items()
            }
            required = [name for name in node.get("required", ()) if name != "status"]
            if required:
                result["required"] = required
            if rules := self.rules.get(node.get("title", "")):
                own = result.get("x-kubernetes-validations", [])
                result["x-kubernetes-validations"] = [*own, *rules]
        elif isinstance(node.get("additionalProperties"), dict):
            result["additionalProperties"] = self.convert(node["additionalProperties"])
        if "items" in node:
            result["items"] = self.convert(node["items"])


def _without_nulls(document: Json) -> Json:
    """Return the document without fields that say nothing, at any depth."""
    said: Json = {}
    for name, value in document.items():
        kept = _without_nulls(value) if isinstance(value, dict) else value
        if kept is not None and kept != {}:
            said[name] = kept
    return said
