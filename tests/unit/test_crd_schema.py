"""The generated CRDs keep the promises a structural schema and our users depend on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hack.generate import __main__ as generate
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.crds.schema import ALL, Crd, build_crd

ROOT = Path(__file__).resolve().parents[2]
IDS = [crd.kind for crd in ALL]
FORBIDDEN = {"$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "const", "title", "nullable"}


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, member in schema.get("properties", {}).items():
        yield from nodes(member, f"{path}.{name}")
    for word in ("items", "additionalProperties"):
        if word in schema:
            yield from nodes(schema[word], f"{path}[]")


def schema_of(crd: Crd) -> dict[str, Any]:
    version = build_crd(crd)["spec"]["versions"][0]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_no_word_that_a_structural_schema_forbids(crd: Crd) -> None:
    found = {
        f"{path}: {word}"
        for path, node in nodes(schema_of(crd))
        for word in node.keys() & FORBIDDEN
    }
    assert found == set()


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_every_field_has_a_description_and_a_type(crd: Crd) -> None:
    for path, node in nodes(schema_of(crd)):
        assert "type" in node or "x-kubernetes-int-or-string" in node, path
        if not path.endswith("[]") and path not in ("", ".metadata"):
            assert node.get("description"), f"{path} has no description for kubectl explain"


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_every_validation_has_a_sentence_for_the_user(crd: Crd) -> None:
    for path, node in nodes(schema_of(crd)):
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"][0].isalpha(), path
            assert rule["message"].endswith("."), f"{path}: {rule['message']}"


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_every_list_is_bounded_so_that_its_rules_are_affordable(crd: Crd) -> None:
    unbounded = {
        path
        for path, node in nodes(schema_of(crd))
        if node.get("type") == "array" and "maxItems" not in node and "status.pods[]" not in path
    }
    assert unbounded == set()


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_every_column_shows_a_field_of_the_schema(crd: Crd) -> None:
    paths = {path for path, _ in nodes(schema_of(crd))}
    for column in crd.columns:
        path = column.path.split("[?")[0]
        assert path in paths or path == ".metadata.creationTimestamp", column.name


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_the_crd_stays_under_64_kb(crd: Crd) -> None:
    path = ROOT / f"manifests/crds/mizzen.dev_{crd.plural}.yaml"
    assert path.stat().st_size < 64 * 1024


@pytest.mark.parametrize("crd", ALL, ids=IDS)
def test_nothing_in_a_pod_patch_reaches_the_node(crd: Crd) -> None:
    text = yaml.safe_dump(schema_of(crd)["properties"]["spec"]["properties"]["podTemplatePatch"])
    schema = yaml.safe_load(text)
    names = {path.rpartition(".")[2] for path, _ in nodes(schema)}
    dangerous = {
        "hostPath", "hostNetwork", "hostPID", "hostIPC", "privileged", "securityContext",
        "containers", "initContainers", "serviceAccountName", "hostUsers", "nodeName", "csi",
    }  # fmt: skip
    assert names & dangerous == set()


def test_generated_files_follow_the_models() -> None:
    assert generate.main(["all", "--check"]) == 0


def test_the_check_fails_on_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    assert generate.main(["crds", "--check"]) == 1
    assert generate.main(["crds"]) == 0
    assert generate.main(["crds", "--check"]) == 0


REPLICAS: dict[str, tuple[dict[str, Any], int | None, int]] = {
    "one when nothing is said": ({}, None, 1),
    "the fixed number": ({"replicas": 3}, None, 3),
    "the fixed number, whatever a former answer said": ({"replicas": 3}, 5, 3),
    "none when asked for none": ({"replicas": 0}, None, 0),
    "the lower bound before the first answer": ({"scaling": {"min": 2, "max": 4}}, None, 2),
    "at least one before the first answer": ({"scaling": {"min": 0, "max": 4}}, None, 1),
    "the autoscaler's answer": ({"scaling": {"min": 0, "max": 4}}, 3, 3),
    "the autoscaler's zero": ({"scaling": {"min": 0, "max": 4}}, 0, 0),
    "one after scaling was removed": ({}, 4, 1),
}


@pytest.mark.parametrize(("extra", "scaled", "expected"), REPLICAS.values(), ids=REPLICAS)
def test_wanted_replicas(extra: dict[str, Any], scaled: int | None, expected: int) -> None:
    spec = LLMDeploymentSpec.parse({"model": {"source": "pvc://models/m"}, **extra})
    assert spec.wanted_replicas(scaled) == expected


DEVICES: dict[str, tuple[dict[str, Any], int]] = {
    "none on the CPU": ({"parallelism": {"tensor": 2}}, 0),
    "one for each rank of the pod": (
        {"accelerator": {"resource": "nvidia.com/gpu"}, "parallelism": {"tensor": 8, "nodes": 2}},
        4,
    ),
    "one for each rank of all stages": (
        {
            "accelerator": {"resource": "nvidia.com/gpu"},
            "parallelism": {"tensor": 4, "pipeline": 6, "nodes": 3},
        },
        8,
    ),
    "as many as asked for": ({"accelerator": {"resource": "nvidia.com/gpu", "count": 3}}, 3),
}


@pytest.mark.parametrize(("extra", "expected"), DEVICES.values(), ids=DEVICES)
def test_devices_per_pod(extra: dict[str, Any], expected: int) -> None:
    spec = LLMDeploymentSpec.parse({"model": {"source": "pvc://models/m"}, **extra})
    assert spec.devices_per_pod == expected


def test_a_field_of_a_newer_crd_does_not_stop_the_operator() -> None:
    spec = LLMDeploymentSpec.parse({"model": {"source": "file:///m", "later": 1}, "newer": {}})
    assert spec.model.source == "file:///m"


def test_a_spec_written_under_looser_rules_is_named_field_by_field() -> None:
    with pytest.raises(ValidationError, match="baseModel"):
        FineTuneJobSpec.parse({"method": "sft"})


def test_every_field_of_a_job_is_kept_as_it_was_but_those_that_the_refusal_names() -> None:
    spec = schema_of(next(crd for crd in ALL if crd.kind == "FineTuneJob"))["properties"]["spec"]
    refusals = [
        rule["message"].removesuffix(").").split(" cannot change (only ")
        for rule in spec["x-kubernetes-validations"]
        if " cannot change " in rule["message"]
    ]
    kept = {name for what, _ in refusals for name in what.removeprefix("spec.").split(", ")}
    ((*_, may_change),) = {tuple(refusal[1:]) for refusal in refusals}
    named = set(may_change.removesuffix(" can").replace(" and ", ", ").split(", "))
    assert kept & named == set()
    assert kept | named == set(spec["properties"])
