"""What the operator makes of a deployment: manifests, hardening, and when a revision changes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.desired.adapters import PromotedArtifact, WantedAdapter, wanted_adapters
from mizzen.operator.desired.children import build_children
from mizzen.operator.desired.network import build_admin_secret, build_network_policy
from mizzen.operator.desired.serving import PodPlace, build_pod, revision_of
from mizzen.operator.desired.sources import Source, claim_volume, locate
from tests.fixtures.wanted_serving import serving

GOLDEN = Path(__file__).parent / "golden" / "serving"
CASES = sorted(path.name.removesuffix(".in.yaml") for path in GOLDEN.glob("*.in.yaml"))
Json = dict[str, Any]


def pod(**spec: Any) -> Json:
    return build_pod(serving(**spec), PodPlace(revision="r1", slot=0, rank=0))


@pytest.mark.parametrize("case", CASES)
def test_manifests_are_as_reviewed(case: str) -> None:
    wanted = serving(**yaml.safe_load((GOLDEN / f"{case}.in.yaml").read_text()))
    revision = revision_of(wanted)
    documents = [
        *build_children(
            wanted,
            has_served=True,
            has_groups=wanted.spec.parallelism.nodes > 1,
            replicas=wanted.spec.desired_replicas,
        ),
        *(
            build_pod(wanted, PodPlace(revision=revision, slot=0, rank=rank))
            for rank in range(wanted.spec.parallelism.nodes)
        ),
    ]
    text = yaml.safe_dump_all(documents, sort_keys=False)
    reviewed = GOLDEN / f"{case}.out.yaml"
    if os.environ.get("MIZZEN_REWRITE_GOLDEN"):
        reviewed.write_text(text)
    assert text == reviewed.read_text()


@pytest.mark.parametrize("case", CASES)
def test_every_pod_passes_the_restricted_level_with_a_read_only_root(case: str) -> None:
    made = pod(**yaml.safe_load((GOLDEN / f"{case}.in.yaml").read_text()))["spec"]
    assert made["automountServiceAccountToken"] is False
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = made["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    kinds = {key for volume in made["volumes"] for key in volume} - {"name"}
    assert kinds <= {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}


SAME = {
    "another number of replicas": {"replicas": 5},
    "bounds instead": {"scaling": {"min": 1, "max": 3}},
    "an adapter on the model's own claim": {
        "adapters": [{"name": "a", "source": "pvc://models/adapters/a"}]
    },
    "another pace": {"rollout": {"maxSurge": 3}},
    "a default written out": {"drain": {"maxSeconds": 120}, "parallelism": {"pipeline": 1}},
}
DIFFERENT = {
    "another model": {"model": {"source": "pvc://models/other"}},
    "another name for clients": {"model": {"source": "pvc://models/smollm2", "servedName": "x"}},
    "an engine setting": {"engine": {"maxNumSeqs": 7}},
    "another image": {"engine": {"image": "other"}},
    "another number of ranks": {"parallelism": {"tensor": 2}},
    "another number of stages": {"parallelism": {"pipeline": 2}},
    "GPUs": {"accelerator": {"resource": "nvidia.com/gpu"}},
    "another time to drain": {"drain": {"maxSeconds": 7}},
    "a patch": {"podTemplatePatch": {"nodeSelector": {"disk": "fast"}}},
    "an adapter on a claim that is not mounted yet": {
        "adapters": [{"name": "a", "source": "pvc://elsewhere/a"}]
    },
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_the_revision_stays_with(change: Json) -> None:
    assert revision_of(serving(**change)) == revision_of(serving())


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_the_revision_changes_with(change: Json) -> None:
    assert revision_of(serving(**change)) != revision_of(serving())


def test_the_revision_of_a_spec_stays_the_same_from_version_to_version() -> None:
    """An upgrade of the operator that changed this would restart every model in the cluster."""
    assert revision_of(serving()) == "858acb29"


def test_a_collector_of_traces_is_told_to_the_pods_and_part_of_their_revision() -> None:
    traced = replace(serving(), otlp_endpoint="http://otel:4318")
    assert revision_of(traced) != revision_of(serving())
    told = {"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://otel:4318"}
    for wanted, expected in ((traced, True), (serving(), False)):
        built = build_pod(wanted, PodPlace(revision="r1", slot=0, rank=0))
        assert (told in built["spec"]["containers"][0]["env"]) is expected


def test_a_replica_asks_for_one_device_per_rank_and_cannot_be_patched_to_fewer() -> None:
    patch = {"resources": {"limits": {"nvidia.com/gpu": 1, "memory": "1Gi"}}}
    made = pod(
        accelerator={"resource": "nvidia.com/gpu"},
        parallelism={"tensor": 4},
        podTemplatePatch=patch,
    )
    limits = made["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "4", "memory": "1Gi"}


def test_the_pods_of_a_replica_in_stages_ask_for_the_devices_of_their_own_ranks() -> None:
    spread = {"tensor": 4, "pipeline": 2, "nodes": 2}
    container = pod(accelerator={"resource": "nvidia.com/gpu"}, parallelism=spread)["spec"][
        "containers"
    ][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    flags = dict(zip(container["args"][2::2], container["args"][3::2], strict=True))
    assert flags["--tensor-parallel-size"] == "4"
    assert flags["--pipeline-parallel-size"] == "2"
    assert flags["--nnodes"] == "2"
    assert "--pipeline-parallel-size" not in pod()["spec"]["containers"][0]["args"]


def test_a_limit_below_our_default_request_replaces_it() -> None:
    made = pod(podTemplatePatch={"resources": {"limits": {"memory": "128Mi"}}})
    resources = made["spec"]["containers"][0]["resources"]
    assert resources == {"requests": {"cpu": "100m"}, "limits": {"memory": "128Mi"}}


def test_a_replica_on_the_cpu_asks_for_no_device() -> None:
    assert "limits" not in pod(parallelism={"tensor": 2})["spec"]["containers"][0]["resources"]


def test_a_pod_may_drain_before_it_is_killed() -> None:
    assert pod(drain={"maxSeconds": 300})["spec"]["terminationGracePeriodSeconds"] == 330


def test_only_the_leader_of_a_group_has_the_gate() -> None:
    group = serving(parallelism={"tensor": 2, "nodes": 2})
    pods = [build_pod(group, PodPlace(revision="r1", slot=0, rank=rank)) for rank in range(2)]
    assert ["readinessGates" in made["spec"] for made in pods] == [True, False]
    assert [made["spec"]["restartPolicy"] for made in pods] == ["Never", "Never"]


def test_a_budget_exists_only_for_more_than_one_replica() -> None:
    def kinds(replicas: int) -> set[str]:
        made = build_children(serving(), has_served=True, has_groups=False, replicas=replicas)
        return {child["kind"] for child in made}

    assert kinds(1) == {"Service"}
    assert kinds(2) == {"Service", "PodDisruptionBudget"}


def test_there_is_no_service_before_a_replica_serves() -> None:
    assert build_children(serving(), has_served=False, has_groups=False, replicas=1) == ()


def test_users_reach_the_serving_ports_and_only_we_reach_the_others() -> None:
    rules = build_network_policy("team", operator_namespace="mizzen-system")["spec"]["ingress"]
    open_to_all = [rule for rule in rules if "from" not in rule]
    assert [[port["port"] for port in rule["ports"]] for rule in open_to_all] == [[8000, 8001]]
    (ours,) = [rule for rule in rules if "from" in rule]
    assert "ports" not in ours
    namespaces = [peer.get("namespaceSelector") for peer in ours["from"]]
    assert namespaces == [{"matchLabels": {"kubernetes.io/metadata.name": "mizzen-system"}}]


def test_the_pods_of_a_group_find_each_other_before_they_are_ready() -> None:
    group = serving(parallelism={"tensor": 4, "nodes": 2})
    first, second = (
        build_pod(group, PodPlace(revision="r1", slot=3, rank=rank))["spec"] for rank in range(2)
    )
    children = build_children(group, has_served=False, has_groups=True, replicas=1)
    policy, service = children
    address = f"smollm2-r1-3-0.{service['metadata']['name']}.team.svc"
    assert service["spec"]["publishNotReadyAddresses"]
    assert "mizzen.dev/deployment" not in service["metadata"]["labels"], "gateways look for it"
    assert service["metadata"]["name"] == first["subdomain"] == second["subdomain"]
    assert [made["hostname"] for made in (first, second)] == ["smollm2-r1-3-0", "smollm2-r1-3-1"]
    assert first["containers"][0]["args"][-8:] == [
        *("--nnodes", "2", "--node-rank", "0", "--master-addr", address, "--master-port", "8003")
    ]
    assert second["containers"][0]["args"][-5] == "1"
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": policy["spec"]["podSelector"]}]}]


def test_the_names_of_a_group_s_objects_cannot_be_those_of_another_deployment() -> None:
    group = serving(parallelism={"tensor": 2, "nodes": 2})
    made = build_children(group, has_served=True, has_groups=True, replicas=1)
    names = [child["metadata"]["name"] for child in made]
    assert names == ["smollm2-ranks-8c1b2c1e", "smollm2-ranks-8c1b2c1e", "smollm2"]


def test_the_token_is_copied_as_it_is() -> None:
    assert build_admin_secret("team", token="abc")["data"] == {"token": "YWJj"}


def test_an_adapter_of_the_spec_wins_over_a_promoted_one_of_the_same_name() -> None:
    parsed = serving(adapters=[{"name": "a", "source": "pvc://models/mine"}]).spec
    promoted = [
        PromotedArtifact("a", "pvc://models/theirs", "sha256:1", "a"),
        PromotedArtifact("b", "pvc://models/b", "sha256:2", "job-of-b"),
    ]
    assert wanted_adapters(parsed.adapters, promoted) == (
        WantedAdapter("a", Source("/mnt/pvc/models/mine", "models")),
        WantedAdapter("b", Source("/mnt/pvc/models/b", "models"), "sha256:2", "job-of-b"),
    )


ADDRESSES = {
    "pvc://models/smollm2": Source("/mnt/pvc/models/smollm2", "models"),
    "pvc://models": Source("/mnt/pvc/models", "models"),
    "pvc://models/a/b.gguf": Source("/mnt/pvc/models/a/b.gguf", "models"),
    "file:///models/x": Source("/models/x"),
}


@pytest.mark.parametrize(("address", "source"), ADDRESSES.items())
def test_an_address_becomes_a_path_in_the_pod(address: str, source: Source) -> None:
    assert locate(address) == source


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="must look like pvc://CLAIM/PATH or file:///PATH"):
        locate("hf://org/model")


@given(st.text("a0-.", min_size=1, max_size=253).map(lambda text: f"x{text}x"))
def test_any_claim_gets_a_volume_name_that_is_a_dns_label(claim: str) -> None:
    name = claim_volume(claim)["name"]
    assert len(name) <= 63
    assert name.replace("-", "").isalnum() and not name.endswith("-")
