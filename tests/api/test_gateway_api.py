"""InferencePool and HTTPRoute on a real API server, whose kinds come while the operator runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack.cluster.api_only import ApiCluster
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeRuntimes

pytestmark = pytest.mark.api

Json = dict[str, Any]
INSTALLATION = "mizzen-gateway-api"
CRDS = str(Path(__file__).parent.parent / "fixtures" / "gateway_api_crds.yaml")
BOTH = {"parent_gateway": "front", "endpoint_picker": "{deployment}-epp"}


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: ApiCluster) -> Iterator[None]:
    """The operator's namespace and token; the foreign kinds are gone afterwards."""
    with installation(cluster, INSTALLATION):
        yield
        cluster.kubectl("delete", "-f", CRDS, "--ignore-not-found", "--wait=false")


def operator(**settings: Any) -> RunningOperator:
    return RunningOperator(
        FakeRuntimes(),
        namespace=INSTALLATION,
        lease_name="mizzen-gateway-api",
        gateway_api_s=0.5,
        **settings,
    )


def wait_until(is_true: Callable[[], bool], *, timeout_s: float = 500) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.3)


def test_routes_come_with_their_kinds_and_go_with_the_deployment_or_the_setting(
    cluster: ApiCluster, namespace: str
) -> None:
    def kubectl(*arguments: str, stdin: str | None = None) -> str:
        return cluster.kubectl("-n", namespace, *arguments, stdin=stdin)

    def serve(name: str) -> None:
        spec = {"model": {"source": "file:///models/smollm2"}}
        document = {"apiVersion": "mizzen.dev/v1alpha1", "kind": "LLMDeployment"}
        document |= {"metadata": {"name": name}, "spec": spec}
        kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document))

    def made() -> set[str]:
        return set(kubectl("get", "inferencepools,httproutes", "-o", "name").split())

    pool = "inferencepool.inference.networking.k8s.io"
    route = "httproute.gateway.networking.k8s.io"
    with operator(**BOTH) as running:
        serve("first")
        kubectl("wait", "--for=condition=Ready", "llmd/first", "--timeout=500s")
        events = json.loads(kubectl("get", "events", "-o", "json"))["items"]
        assert not [event for event in events if event["reason"] == "RouteNotWritten"]

        cluster.kubectl("apply", "--server-side", "-f", CRDS)
        cluster.kubectl("wait", "--for=condition=Established", "-f", CRDS, "--timeout=300s")
        wait_until(lambda: made() == {f"{pool}/first", f"{route}/first"})
        spec = json.loads(kubectl("get", "inferencepool", "first", "-o", "json"))["spec"]
        assert spec["endpointPickerRef"]["name"] == "first-epp"
        selector = ",".join(f"{k}={v}" for k, v in spec["selector"]["matchLabels"].items())
        assert len(kubectl("get", "pods", "-l", selector, "-o", "name").split()) == 1
        [rule] = json.loads(kubectl("get", "httproute", "first", "-o", "json"))["spec"]["rules"]
        assert rule["backendRefs"][0]["kind"] == "InferencePool"

        # What the server adds by itself is no difference to write away, again and again.
        before = running.settled_writes(namespace)
        for _ in range(10):
            running.look_at(namespace, "first")
            time.sleep(0.1)
        assert running.settled_writes(namespace) == before

        serve("second")
        wait_until(lambda: {f"{pool}/second", f"{route}/second"} <= made())
        kubectl("delete", "llmd", "first", "--wait=false")
        wait_until(lambda: made() == {f"{pool}/second", f"{route}/second"})

    with operator():
        wait_until(lambda: made() == set())
