"""The chart as rendered by Helm: generated files are fresh, and nothing asks for too much."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hack.chart.__main__ import CHART, INSTALL, chart_files
from hack.chart.crds import crds_template
from hack.chart.documents import leaf_paths, schema_json, values_yaml
from hack.chart.install import find_helm, install_yaml

HELM = find_helm()
NAME = "mizzen-test"
needs_helm = pytest.mark.skipif(HELM is None, reason="no helm here; `make bin` builds one")
EVERYTHING = {
    "watchNamespaces": ["team-a", "team-b"],
    "image": {"pullSecrets": ["registry"], "control": {"digest": f"sha256:{'0' * 64}"}},
    "operator": {
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-cluster-critical",
        "podAnnotations": {"note": "x"},
        "podLabels": {"team": "x"},
    },
    "gateway": {
        "service": {"type": "LoadBalancer", "annotations": {"lb": "internal"}},
        "batches": {"volume": "batch-files"},
    },
    "gatewayApi": {
        "parentRef": {"name": "front", "namespace": "edge", "sectionName": "https"},
        "endpointPicker": {"name": "{deployment}-epp", "port": 9003},
    },
    "metrics": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "tracing": {"endpoint": "http://otel-collector.monitoring:4318"},
    "test": {"model": "pvc://models/smollm2"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "small": {
        "operator": {"replicas": 1},
        "gateway": {"replicas": 1, "auth": {"enabled": False}},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "rbac": {"aggregate": False},
        "crds": {"install": False},
        "test": {"servedModel": "quickstart/smollm2"},
    },
    "token by a Job": {"adminToken": {"source": "Job"}, "crds": {"keep": False}},
    "token made elsewhere": {"adminToken": {"source": "Existing"}},
}

Document = dict[str, Any]


def helm(*arguments: str, values: Document) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    return subprocess.run(
        [HELM, *arguments, "--namespace", "home", "--values", "-"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
    )


def render(values: Document) -> list[Document]:
    done = helm("template", "mizzen", str(CHART), values=values)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def pod_specs(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        name = f"{document['kind']}/{document['metadata'].get('name')}"
        if document["kind"] == "Pod":
            yield name, document["spec"]
        elif document["kind"] in ("Deployment", "Job"):
            yield name, document["spec"]["template"]["spec"]


# Generated files.


def test_generated_files_are_fresh() -> None:
    stale = [path.name for path, text in chart_files() if path.read_text() != text]
    assert stale == [], "run `make chart`"


@needs_helm
def test_the_one_file_install_is_fresh() -> None:
    assert HELM is not None
    assert INSTALL.read_text() == install_yaml(HELM, CHART), "run `make chart`"


def test_the_defaults_fit_their_own_schema() -> None:
    jsonschema.validate(yaml.safe_load(values_yaml()), json.loads(schema_json()))


def test_every_table_of_the_schema_refuses_unknown_keys() -> None:
    def open_tables(node: object, path: str) -> Iterator[str]:
        if isinstance(node, list):
            for entry in node:
                yield from open_tables(entry, path)
        elif isinstance(node, dict):
            is_table = bool(node.get("properties")) and node.get("type") == "object"
            if is_table and node.get("additionalProperties") is not False:
                yield path
            for key, value in node.items():
                yield from open_tables(value, f"{path}.{key}")

    assert list(open_tables(json.loads(schema_json()), "")) == []


def test_every_value_is_used_by_a_template() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    used = set(re.findall(r"[a-zA-Z]+", templates))
    unused = [path for path in leaf_paths() if path.rsplit(".", 1)[-1] not in used]
    # Requests and limits are written out together.
    assert [path for path in unused if ".resources." not in path] == []


def test_a_crd_that_helm_would_take_for_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("metadata:\n  name: x\nspec: '{{ .Values }}'\n")
    with pytest.raises(ValueError, match="Helm would take for a template"):
        crds_template(tmp_path)


# Rendered.


@needs_helm
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_helm_lint_is_content(values: Document) -> None:
    done = helm("lint", str(CHART), "--strict", values=values)
    assert done.returncode == 0, done.stdout


BAD_VALUES: dict[str, tuple[Document, str]] = {
    "a misspelt key": ({"gatway": {}}, "gatway"),
    "a misspelt key inside": ({"gateway": {"auth": {"enable": False}}}, "enable"),
    "a wrong type": ({"operator": {"replicas": "two"}}, "replicas"),
    "a wrong choice": ({"adminToken": {"source": "Magic"}}, "source"),
    "an address that is no model": ({"test": {"model": "smollm2"}}, "model"),
}


@needs_helm
@pytest.mark.parametrize(("values", "names"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_stops_the_install_and_is_named(values: Document, names: str) -> None:
    done = helm("template", "mizzen", str(CHART), values=values)
    assert done.returncode != 0
    assert names in done.stderr


@needs_helm
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_every_pod_is_restricted_and_ignores_service_variables(values: Document) -> None:
    found = dict(pod_specs(render(values)))
    assert "Deployment/mizzen-operator" in found
    for name, spec in found.items():
        # A Service named mizzen-gateway would set MIZZEN_GATEWAY_PORT, which is a setting of ours.
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert "automountServiceAccountToken" in spec, name
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name


@needs_helm
@pytest.mark.parametrize("values", VARIANTS.values(), ids=VARIANTS)
def test_no_role_has_wildcards_or_ways_to_more(values: Document) -> None:
    documents = render(values)
    roles = of_kind(documents, "ClusterRole") + of_kind(documents, "Role")
    assert roles
    for role in roles:
        for rule in role["rules"]:
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not any("*" in word for word in words), role["metadata"]["name"]
            assert not words & {"escalate", "bind", "impersonate", "pods/exec", "pods/attach"}


@needs_helm
def test_secrets_are_read_by_name_or_in_the_home_namespace_only() -> None:
    documents = render({})
    readers = {
        role["metadata"]["name"]: (role["kind"], rule.get("resourceNames"), rule["verbs"])
        for role in of_kind(documents, "ClusterRole") + of_kind(documents, "Role")
        for rule in role["rules"]
        if "secrets" in rule["resources"]
    }
    assert readers == {
        "mizzen-operator": (
            "ClusterRole",
            ["mizzen-admin"],
            ["get", "create", "patch", "delete"],
        ),
        "mizzen-operator-home": ("Role", ["mizzen-admin"], ["get"]),
        "mizzen-gateway-keys": ("Role", None, ["list", "watch"]),
    }


@needs_helm
def test_chosen_namespaces_get_roles_and_nothing_is_cluster_wide() -> None:
    documents = render({"watchNamespaces": ["team-a"], "rbac": {"aggregate": False}})
    assert not of_kind(documents, "ClusterRole")
    assert not of_kind(documents, "ClusterRoleBinding")
    roles = {
        (r["metadata"]["namespace"], r["metadata"]["name"]) for r in of_kind(documents, "Role")
    }
    assert {("team-a", "mizzen-operator"), ("team-a", "mizzen-gateway")} <= roles
    env = {
        entry["name"]: entry.get("value")
        for deployment in of_kind(documents, "Deployment")
        for entry in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert env["MIZZEN_WATCH_NAMESPACES"] == '["team-a"]'
    assert env["MIZZEN_GATEWAY_WATCH_NAMESPACES"] == '["team-a"]'


@needs_helm
def test_crds_can_be_left_out_and_are_kept_unless_told_otherwise() -> None:
    assert not of_kind(render({"crds": {"install": False}}), "CustomResourceDefinition")
    for keep, expected in ((True, "keep"), (False, None)):
        crds = of_kind(render({"crds": {"keep": keep}}), "CustomResourceDefinition")
        assert len(crds) == 2
        for crd in crds:
            annotations = crd["metadata"].get("annotations", {})
            assert annotations.get("helm.sh/resource-policy") == expected


@needs_helm
def test_images_follow_their_values() -> None:
    values = {
        "image": {
            "control": {"repository": "r/control", "tag": "1"},
            "runtime": {"repository": "r/runtime", "digest": f"sha256:{'a' * 64}"},
        }
    }
    text = json.dumps(render(values))
    assert '"image": "r/control:1"' in text
    assert f'"value": "r/runtime@sha256:{"a" * 64}"' in text


@needs_helm
@pytest.mark.parametrize("endpoint", ["", "http://otel:4318"], ids=["none", "one"])
def test_a_collector_of_traces_is_told_to_the_gateway_and_through_the_operator(
    endpoint: str,
) -> None:
    values = {"tracing": {"endpoint": endpoint}} if endpoint else {}
    told = {
        name: variable["value"]
        for _, spec in pod_specs(render(values))
        for variable in spec["containers"][0].get("env", [])
        if (name := variable["name"]).endswith("OTLP_ENDPOINT")
    }
    # An empty variable would be read as one that is set.
    gateway = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} if endpoint else {}
    assert told == {"MIZZEN_OTLP_ENDPOINT": endpoint, **gateway}


@needs_helm
def test_the_gateway_and_the_picker_to_use_are_told_to_the_operator() -> None:
    [pod] = (s for name, s in pod_specs(render(EVERYTHING)) if name.endswith("-operator"))
    told = {v["name"]: v.get("value") for v in pod["containers"][0]["env"]}
    assert {name: told[name] for name in told if "PARENT_" in name or "PICKER" in name} == {
        "MIZZEN_PARENT_GATEWAY": "front",
        "MIZZEN_PARENT_GATEWAY_NAMESPACE": "edge",
        "MIZZEN_PARENT_GATEWAY_SECTION": "https",
        "MIZZEN_ENDPOINT_PICKER": "{deployment}-epp",
        "MIZZEN_ENDPOINT_PICKER_PORT": "9003",
    }


@needs_helm
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["whole cluster", "chosen namespaces"])
def test_the_operator_may_also_remove_routes_that_an_earlier_setting_made(
    values: Document,
) -> None:
    kind = "Role" if values else "ClusterRole"
    roles = [r for r in of_kind(render(values), kind) if r["metadata"]["name"] == "mizzen-operator"]
    assert roles
    for role in roles:
        verbs = {what: rule["verbs"] for rule in role["rules"] for what in rule["resources"]}
        for what in ("httproutes", "inferencepools"):
            assert verbs[what] == ["get", "list", "create", "patch", "delete"]


@needs_helm
def test_only_the_pod_is_a_hook_of_the_test() -> None:
    # Helm takes every hook of a test for a pod and fails to find its logs.
    for values in ({}, {"test": {"servedModel": "a/b"}}, {"test": {"model": "pvc://m/x"}}):
        hooks = {
            document["kind"]
            for document in render(values)
            if "helm.sh/hook" in document["metadata"].get("annotations", {})
        }
        assert hooks == {"Pod"}


@needs_helm
def test_the_test_gets_no_more_rights_than_it_needs() -> None:
    def rights(values: Document) -> set[str]:
        roles = [r for r in of_kind(render(values), "Role") if r["metadata"]["name"] == NAME]
        return {what for role in roles for rule in role["rules"] for what in rule["resources"]}

    no_auth = {"gateway": {"auth": {"enabled": False}}}
    served = {"test": {"servedModel": "a/b"}}
    assert rights({}) == set()
    assert rights(served) == {"secrets"}
    assert rights(served | no_auth) == set()
    assert rights({"test": {"model": "pvc://m/x"}}) == {"secrets", "llmdeployments"}


@needs_helm
def test_another_release_name_is_part_of_every_name() -> None:
    done = helm("template", "blue", str(CHART), values={})
    names = [
        document["metadata"]["name"]
        for document in yaml.safe_load_all(done.stdout)
        if document and document["kind"] in ("Deployment", "Service", "ServiceAccount")
    ]
    assert names
    assert all(name.startswith("blue-mizzen-") for name in names)


def test_the_one_file_install_holds_no_secret_and_a_namespace_for_everything() -> None:
    documents = [d for d in yaml.safe_load_all(INSTALL.read_text()) if d]
    kinds = [document["kind"] for document in documents]
    assert kinds[0] == "Namespace"
    assert "Secret" not in kinds
    assert kinds.count("CustomResourceDefinition") == 2
    assert "helm" not in INSTALL.read_text().split("---", 1)[1].lower()


@needs_helm
def test_the_claim_for_batches_is_where_the_gateway_keeps_them() -> None:
    documents = render({"gateway": {"batches": {"volume": "files"}}})
    [pod] = (spec for name, spec in pod_specs(documents) if name.endswith("-gateway"))
    claims = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
    [container] = pod["containers"]
    [mount] = (m for m in container["volumeMounts"] if claims[m["name"]] is not None)
    assert claims[mount["name"]] == {"claimName": "files"}
    assert {"name": "MIZZEN_GATEWAY_BATCHES_DIR", "value": mount["mountPath"]} in container["env"]
