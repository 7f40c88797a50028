"""The autoscaler on a real API server: load that processes report becomes simulated pods.

The gateway and the runtimes are the real exporters behind small HTTP servers on loopback; kwok's
pods have no process, so the operator is told where to look instead of their addresses.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml
from kubernetes.aio.config import kube_config
from prometheus_client.exposition import generate_latest

from hack.cluster.api_only import ApiCluster
from mizzen.operator.metrics.figures import Measured, Name, Target
from mizzen.operator.metrics.scrape import ScrapeSource
from mizzen.runtime.gateway.directory import ServedModel
from tests.fixtures.metrics_story import ExportedRuntime, Story
from tests.fixtures.running_operator import RunningOperator
from tests.fixtures.serving_world import FakeRuntimes

pytestmark = pytest.mark.api

INSTALLATION = "mizzen-scaling"
IDLE = "idle"  # a deployment, and the runtime that reports for it
Json = dict[str, Any]


class Exporters:
    """A gateway and a runtime under load, each at an address of its own."""

    def __init__(self) -> None:
        self.story = Story()
        self.story.go_on()
        self.is_up = True
        self.idle = ExportedRuntime(running=0, waiting=0)
        self.servers = {name: self._serve(name) for name in (*self.story.names, IDLE)}

    def text(self, name: str) -> str:
        if name == IDLE:
            return generate_latest(self.idle.metrics.registry).decode()
        return self.story.text(name)

    def _serve(self, name: str) -> ThreadingHTTPServer:
        exporters = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if exporters.is_up else 503)
                self.end_headers()
                self.wfile.write(exporters.text(name).encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.servers[name].server_address[1]}"

    def stop(self) -> None:
        for server in self.servers.values():
            server.shutdown()


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
        names = [n for n in self._exporters.story.names if n != "gateway"]
        if target.name[1] == IDLE:
            names = [IDLE]
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))
        cluster.create_namespace(INSTALLATION)
        token = base64.b64encode(b"token").decode()
        secret = {"apiVersion": "v1", "kind": "Secret", "data": {"token": token}}
        metadata = {"name": "mizzen-admin", "namespace": INSTALLATION}
        cluster.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(secret | {"metadata": metadata}))
        with RunningOperator(
            FakeRuntimes(),
            metrics=LoopbackSource(exporters),
            namespace=INSTALLATION,
            lease_name="mizzen-scaling",
            autoscale_s=1.0,
            metrics_interval_s=1.0,
        ) as running:
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


def wait_until(is_true: Any, *, timeout_s: float = 180) -> None:
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


def test_a_horizontal_pod_autoscaler_on_the_same_deployment_is_named(
    cluster: ApiCluster, namespace: str, operator: RunningOperator
) -> None:
    hpa = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "rival"},
        "spec": {
            "maxReplicas": 5,
            "scaleTargetRef": {
                "apiVersion": "mizzen.dev/v1alpha1", "kind": "LLMDeployment", "name": "shared",
            },
        },
    }  # fmt: skip
    cluster.kubectl("-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(hpa))
    apply(cluster, namespace, "shared", scaling={"min": 1, "max": 6})
    wait_until(
        lambda: condition(llmd(cluster, namespace, "shared")) == ("False", "OtherAutoscaler")
    )
    conditions = llmd(cluster, namespace, "shared")["status"]["conditions"]
    message = next(c["message"] for c in conditions if c["type"] == "ScalingActive")
    assert message.startswith("HorizontalPodAutoscaler rival scales this deployment too")


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
