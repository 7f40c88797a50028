"""The autoscaler on a real API server: load that processes report becomes simulated pods.

The gateway and the runtimes are the real exporters behind small HTTP servers on loopback; kwok's
pods have no process, so the operator is told where to look instead of their addresses.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import yaml

from hack.cluster.api_only import ApiCluster
from mizzen.operator.metrics.figures import Measured, Name, Target
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.runtime.gateway.directory import ServedModel
from tests.fixtures.exporters import IDLE, Exporters
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeRuntimes

pytestmark = pytest.mark.api

INSTALLATION = "mizzen-scaling"
Json = dict[str, Any]


class LoopbackSource:
    """Direct scrape, with the exporters' addresses in place of the simulated pods'."""

    def __init__(self, exporters: Exporters) -> None:
        self._exporters = exporters

        async def gateways() -> Sequence[str]:
            return [exporters.address("gateway")]

        self._scrape = ScrapeSource(gateways)

    async def collect(self, targets: Sequence[Target]) -> Mapping[Name, Measured]:
        return await self._scrape.collect([self._moved(target) for target in targets])

    def _moved(self, target: Target) -> Target:
        names = [IDLE] if target.name[1] == IDLE else self._exporters.runtimes
        return replace(
            target,
            settled=target.settled and len(names),
            addresses=tuple(map(self._exporters.address, names)),
        )

    async def close(self) -> None:
        await self._scrape.close()


@pytest.fixture(scope="module")
def exporters() -> Iterator[Exporters]:
    made = Exporters()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def operator(cluster: ApiCluster, exporters: Exporters) -> Iterator[RunningOperator]:
    with (
        installation(cluster, INSTALLATION),
        RunningOperator(
            FakeRuntimes(),
            metrics=LoopbackSource(exporters),
            namespace=INSTALLATION,
            lease_name="mizzen-scaling",
            autoscale_s=1.0,
            metrics_interval_s=1.0,
        ) as running,
    ):
        yield running


def apply(cluster: ApiCluster, namespace: str, name: str, **spec: Any) -> None:
    document = {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": {"model": {"source": "file:///models/smollm2"}} | spec,
    }
    cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(document))


def llmd(cluster: ApiCluster, namespace: str, name: str) -> Json:
    found: Json = json.loads(cluster.kubectl("-n", namespace, "get", "llmd", name, "-o", "json"))
    return found


def condition(resource: Json, type_: str = "ScalingActive") -> tuple[str, str]:
    for one in resource.get("status", {}).get("conditions", []):
        if one["type"] == type_:
            return one["status"], one["reason"]
    return "", ""


def wait_until(is_true: Any, *, timeout_s: float = 500) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.3)


def test_reported_load_becomes_replicas_and_describe_explains_it(
    cluster: ApiCluster, namespace: str, operator: RunningOperator, exporters: Exporters
) -> None:
    # The exporters' replicas say 3 running and 1 waiting each: 8 in all, 3 per replica.
    apply(cluster, namespace, "busy", scaling={"min": 1, "max": 6, "targets": {"concurrency": 3}})
    wait_until(lambda: llmd(cluster, namespace, "busy").get("status", {}).get("ready") == "3/3")
    status = llmd(cluster, namespace, "busy")["status"]
    assert status["scaling"]["desired"] == 3
    move = status["scaling"]["history"][0]
    assert (move["before"], move["after"], move["reason"]) == (1, 3, "LoadRose")
    assert move["inputs"]["running"] == "6"
    described = cluster.kubectl("-n", namespace, "describe", "llmd", "busy")
    assert "concurrency 3 = ceil(8 in all / 3 each)" in described
    assert "ScalingActive" in described

    # The metrics are lost: told, and nothing is taken away.
    exporters.is_up = False
    try:
        wait_until(
            lambda: condition(llmd(cluster, namespace, "busy")) == ("False", "SignalsUnknown")
        )
        assert llmd(cluster, namespace, "busy")["status"]["ready"] == "3/3"
    finally:
        exporters.is_up = True
    wait_until(lambda: condition(llmd(cluster, namespace, "busy"))[0] == "True")

    # The answer and the rest of the status have two owners, and neither undoes the other.
    managers = cluster.kubectl(
        "-n", namespace, "get", "llmd", "busy", "--show-managed-fields", "-o",
        "jsonpath={.metadata.managedFields[*].manager}",
    )  # fmt: skip
    assert {"mizzen-status", "mizzen-scaling"} <= set(managers.split())


def rival(api_version: str, kind: str, **spec: Any) -> Json:
    target = {"apiVersion": "mizzen.dev/v1alpha1", "kind": "LLMDeployment", "name": "shared"}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": "rival"},
        "spec": {"scaleTargetRef": target} | spec,
    }


RIVALS = {
    "a HorizontalPodAutoscaler": rival("autoscaling/v2", "HorizontalPodAutoscaler", maxReplicas=5),
    "a ScaledObject": rival("keda.sh/v1alpha1", "ScaledObject"),
}


@pytest.fixture(scope="module")
def keda_crd(cluster: ApiCluster, operator: RunningOperator) -> None:
    """KEDA comes while the operator runs, which has seen no such kind until then."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    crd = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "scaledobjects.keda.sh"},
        "spec": {
            "group": "keda.sh",
            "scope": "Namespaced",
            "names": {"kind": "ScaledObject", "plural": "scaledobjects"},
            "versions": [
                {
                    "name": "v1alpha1",
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                }
            ],
        },
    }
    cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(crd))
    cluster.kubectl(
        "wait", "--for=condition=Established", "crd/scaledobjects.keda.sh", "--timeout=300s"
    )


@pytest.mark.parametrize("document", RIVALS.values(), ids=RIVALS)
def test_another_autoscaler_stops_ours_and_is_named_until_it_is_gone(
    cluster: ApiCluster,
    namespace: str,
    operator: RunningOperator,
    exporters: Exporters,
    keda_crd: None,
    document: Json,
) -> None:
    # Eight requests, two for each replica: four are needed.
    apply(cluster, namespace, "shared", scaling={"min": 1, "max": 6, "targets": {"concurrency": 2}})
    wait_until(lambda: _ready(cluster, namespace, "shared") == "4/4")
    cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(document))
    wait_until(
        lambda: condition(llmd(cluster, namespace, "shared")) == ("False", "OtherAutoscaler")
    )
    status = llmd(cluster, namespace, "shared")["status"]
    message = next(c["message"] for c in status["conditions"] if c["type"] == "ScalingActive")
    assert message.startswith(f"{document['kind']} rival scales this deployment too")

    # One request for each replica would need more than the six that are allowed.
    apply(cluster, namespace, "shared", scaling={"min": 1, "max": 6, "targets": {"concurrency": 1}})
    wait_until(lambda: _scaling(cluster, namespace, "shared").get("recommended") == 6)
    assert _scaling(cluster, namespace, "shared")["desired"] == 4

    cluster.kubectl("-n", namespace, "delete", document["kind"].lower(), "rival")
    wait_until(lambda: condition(llmd(cluster, namespace, "shared"))[0] == "True")
    wait_until(lambda: _ready(cluster, namespace, "shared") == "6/6")


def test_an_idle_deployment_goes_to_zero_and_a_wake_brings_it_back(
    cluster: ApiCluster, namespace: str, operator: RunningOperator, exporters: Exporters
) -> None:
    exporters.story.directory.put_model(ServedModel(namespace, IDLE, name=IDLE))
    apply(
        cluster,
        namespace,
        IDLE,
        scaling={"min": 0, "max": 4, "idle": {"toZeroAfterSeconds": 30}},
    )
    wait_until(lambda: _ready(cluster, namespace, IDLE) == "1/1")
    wait_until(lambda: _ready(cluster, namespace, IDLE) == "0/0")
    scaling = llmd(cluster, namespace, IDLE)["status"]["scaling"]
    assert (scaling["desired"], scaling["reason"]) == (0, "Idle")

    # As the gateway does when it holds twenty requests: eight for each replica.
    wake = "mizzen.dev/wake=2026-09-01T12:00:00Z;held=20"
    cluster.kubectl("-n", namespace, "annotate", "llmd", IDLE, wake)
    wait_until(lambda: _ready(cluster, namespace, IDLE) == "3/3")
    newest = llmd(cluster, namespace, IDLE)["status"]["scaling"]["history"][0]
    assert (newest["before"], newest["after"], newest["reason"]) == (0, 3, "Woken")


def _ready(cluster: ApiCluster, namespace: str, name: str) -> str:
    return str(llmd(cluster, namespace, name).get("status", {}).get("ready"))


def _scaling(cluster: ApiCluster, namespace: str, name: str) -> Json:
    found: Json = llmd(cluster, namespace, name).get("status", {}).get("scaling", {})
    return found
