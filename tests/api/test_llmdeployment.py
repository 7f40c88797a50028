"""The operator and a deployment's life on a real API server, scheduler, controllers and kwok.

Runtimes are played (no process stands behind a simulated pod): that drains and adapter calls work
on real ones is shown by the tests in tests/e2e.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from hack.cluster.api_only import ApiCluster
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeRuntimes

pytestmark = pytest.mark.api
_log = logging.getLogger(__name__)

INSTALLATION = "mizzen-serving"
Json = dict[str, Any]
GPU = {"resource": "nvidia.com/gpu"}


@pytest.fixture(scope="module")
def runtimes() -> FakeRuntimes:
    return FakeRuntimes()


@pytest.fixture(scope="module")
def operator(cluster: ApiCluster, runtimes: FakeRuntimes) -> Iterator[RunningOperator]:
    with (
        installation(cluster, INSTALLATION),
        RunningOperator(runtimes, namespace=INSTALLATION) as running,
    ):
        yield running


class Namespace:
    """One test's namespace, with the words its tests need."""

    def __init__(self, cluster: ApiCluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.cluster.kubectl(
            "label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted"
        )

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, stdin=stdin)

    def apply(self, name: str = "smollm2", **spec: Any) -> None:
        document = {
            "apiVersion": "mizzen.dev/v1alpha1",
            "kind": "LLMDeployment",
            "metadata": {"name": name},
            "spec": {"model": {"source": "file:///models/smollm2"}} | spec,
        }
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document))

    def get(self, *what: str) -> Any:
        return json.loads(self.kubectl("get", *what, "-o", "json"))

    def llmd(self, name: str = "smollm2") -> Json:
        found: Json = self.get("llmd", name)
        return found

    def ready(self, name: str = "smollm2") -> tuple[str, str]:
        """Return Ready's status and reason, empty before the first visit or when outdated."""
        resource = self.llmd(name)
        for condition in resource.get("status", {}).get("conditions", []):
            is_current = condition["observedGeneration"] == resource["metadata"]["generation"]
            if condition["type"] == "Ready" and is_current:
                return condition["status"], condition["reason"]
        return "", ""

    def message(self, name: str = "smollm2") -> str:
        conditions = self.llmd(name)["status"]["conditions"]
        return str(next(c["message"] for c in conditions if c["type"] == "Ready"))

    def wait_ready(self, name: str = "smollm2", *, timeout_s: int = 500) -> None:
        wait_until(lambda: self.ready(name)[0] == "True", timeout_s=timeout_s)

    def pods(self) -> list[Json]:
        found = self.get("pods")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def names(self) -> list[str]:
        return sorted(pod["metadata"]["name"] for pod in self.pods())

    def uids(self) -> set[str]:
        return {pod["metadata"]["uid"] for pod in self.pods()}

    def serving_addresses(self) -> set[str]:
        """Return the addresses that EndpointSlices call ready."""
        slices = self.get("endpointslices", "-l", "mizzen.dev/deployment=smollm2")["items"]
        return {
            endpoint["addresses"][0]
            for one in slices
            for endpoint in one.get("endpoints") or []
            if endpoint["conditions"]["ready"]
        }


@pytest.fixture
def team(cluster: ApiCluster, namespace: str, operator: RunningOperator) -> Iterator[Namespace]:
    team = Namespace(cluster, namespace)
    yield team
    # Shown where the test failed.
    _log.warning("%s", team.kubectl("get", "llmd,pods", "-o", "yaml"))


def wait_until(is_true: Callable[[], bool], *, timeout_s: float = 500) -> None:
    """Wait for a state that must come; the limit only ends a broken run."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)


def test_one_replica_becomes_ready_with_at_most_six_writes(
    team: Namespace, operator: RunningOperator
) -> None:
    team.apply("first")
    team.wait_ready("first")
    # The first one also pays for what the namespace's resources share.
    before = operator.settled_writes(team.name)
    team.apply()
    team.wait_ready()
    made = operator.settled_writes(team.name)[len(before) :]
    assert len(made) <= 6, made
    assert team.llmd()["status"]["pods"][0]["state"] == "Ready"
    assert team.kubectl("wait", "--for=condition=Ready", "llmd/smollm2", "--timeout=300s")


def test_a_hundred_looks_and_a_restart_write_nothing(
    team: Namespace, operator: RunningOperator
) -> None:
    team.apply(replicas=2)
    team.wait_ready()
    before = operator.settled_writes(team.name)
    version = team.llmd()["metadata"]["resourceVersion"]
    for _ in range(100):
        operator.look_at(team.name, "smollm2")
        time.sleep(0.02)
    assert operator.settled_writes(team.name) == before
    assert team.llmd()["metadata"]["resourceVersion"] == version


def test_a_rollout_replaces_every_replica_and_endpoints_never_fall_below_the_promise(
    team: Namespace, operator: RunningOperator
) -> None:
    team.apply(replicas=2)
    team.wait_ready()
    wait_until(lambda: len(team.serving_addresses()) == 2)
    before = team.names()
    team.apply(replicas=2, engine={"maxNumSeqs": 8})
    lowest = 2
    while team.ready()[0] != "True" or len(team.pods()) != 2:
        lowest = min(lowest, len(team.serving_addresses()))
        time.sleep(0.1)
    assert lowest == 2
    assert not set(before) & set(team.names())


def test_a_scaled_down_replica_is_drained_and_deleted_when_it_is_empty(
    team: Namespace, runtimes: FakeRuntimes
) -> None:
    team.apply(replicas=2)
    team.wait_ready()
    victim = next(pod for pod in team.pods() if pod["metadata"]["name"].endswith("-1-0"))
    address = victim["status"]["podIP"]
    runtimes.in_flight[address] = 1
    team.kubectl("scale", "llmd/smollm2", "--replicas=1")
    wait_until(lambda: address in runtimes.drained)
    wait_until(lambda: address not in team.serving_addresses())
    assert len(team.names()) == 2
    runtimes.in_flight.pop(address)
    wait_until(lambda: len(team.names()) == 1)
    assert victim["metadata"]["name"] not in team.names()
    assert team.get("llmd", "smollm2")["status"]["replicas"] == 1


def test_a_deleted_pod_and_a_drifted_service_come_back(team: Namespace) -> None:
    team.apply()
    team.wait_ready()
    before, (name,) = team.uids(), team.names()
    team.kubectl("delete", "pod", name, "--wait=false")
    wait_until(lambda: len(team.uids() - before) == 1)
    team.wait_ready()
    team.kubectl("patch", "service", "smollm2", "-p", '{"spec": {"selector": {"app": "x"}}}')
    team.kubectl(
        "patch", "service", "smollm2", "--type=json",
        "-p", '[{"op": "remove", "path": "/spec/selector/mizzen.dev~1rank"}]',
    )  # fmt: skip
    wait_until(
        lambda: team.get("service", "smollm2")["spec"]["selector"].get("mizzen.dev/rank") == "0"
    )
    team.kubectl("delete", "service", "smollm2")
    wait_until(lambda: bool(team.kubectl("get", "service", "smollm2", "--ignore-not-found")))


def test_replicas_of_a_lost_node_are_replaced(team: Namespace) -> None:
    (node,) = team.cluster.add_nodes(1, gpus=1, prefix=f"lost-{team.name}-")
    selector = {"nodeSelector": {"kubernetes.io/hostname": node}}
    team.apply(podTemplatePatch=selector)
    team.wait_ready()
    before = team.uids()
    team.cluster.kubectl("delete", "node", node)
    # The cluster waits most of a minute before it believes that a node is gone for good.
    wait_until(lambda: len(team.uids() - before) == 1, timeout_s=500)
    wait_until(lambda: team.ready() == ("False", "Unschedulable"))
    team.apply(podTemplatePatch={})
    team.wait_ready()


def test_more_gpus_than_any_node_has_is_said_and_a_corrected_spec_recovers(
    team: Namespace, operator: RunningOperator
) -> None:
    team.apply(accelerator={**GPU, "count": 16})
    wait_until(lambda: team.ready() == ("False", "MoreDevicesThanAnyNode"))
    assert "the largest node has 8" in team.message()
    before = operator.settled_writes(team.name)
    operator.look_at(team.name, "smollm2")
    assert operator.settled_writes(team.name) == before
    team.apply(accelerator={**GPU, "count": 8})
    team.wait_ready()
    assert team.llmd()["status"]["gpus"] == 8


def test_a_missing_claim_is_named(team: Namespace) -> None:
    team.apply(model={"source": "pvc://nothing/smollm2"})
    wait_until(lambda: team.ready() == ("False", "ClaimNotFound"))
    assert f"no PersistentVolumeClaim nothing in namespace {team.name}" in team.message()


def test_a_group_of_two_pods_is_one_replica_with_one_gate(
    team: Namespace, operator: RunningOperator
) -> None:
    team.apply("first")
    team.wait_ready("first")
    before = operator.settled_writes(team.name)
    team.apply(parallelism={"tensor": 2, "nodes": 2}, accelerator=GPU)
    team.wait_ready()
    made = operator.settled_writes(team.name)[len(before) :]
    # For the group a Service, a NetworkPolicy, and for each pod its release to the scheduler.
    assert len(made) <= 12, made
    assert not any(pod["spec"].get("schedulingGates") for pod in team.pods())
    status = team.llmd()["status"]
    assert (status["ready"], len(status["pods"]), status["gpus"]) == ("1/1", 2, 2)
    assert len(team.serving_addresses()) == 1


def test_an_adapter_is_loaded_on_running_replicas_and_on_later_ones(
    team: Namespace, runtimes: FakeRuntimes
) -> None:
    make_claim(team, "models")
    model = {"source": "pvc://models/smollm2"}
    adapters = [{"name": "support", "source": "pvc://models/adapters/support"}]
    team.apply(model=model)
    team.wait_ready()
    (first,) = team.names()
    team.apply(model=model, adapters=adapters)
    wait_until(lambda: _ready_replicas(team) == 1)
    assert team.names() == [first]
    team.apply(model=model, adapters=adapters, replicas=2)
    wait_until(lambda: _ready_replicas(team) == 2)
    addresses = [pod["status"]["podIP"] for pod in team.pods()]
    assert [runtimes.loaded[ip] for ip in addresses] == [{"support": None}] * 2
    listed = team.get("configmap", "smollm2-adapters")["data"]["adapters.json"]
    assert json.loads(listed)["adapters"][0]["path"] == "/mnt/pvc/models/adapters/support"


def make_claim(team: Namespace, name: str) -> None:
    """Create a claim that is bound to a volume of its own."""
    size, modes = {"storage": "1Gi"}, ["ReadWriteOnce"]
    volume = f"{team.name}-{name}"
    documents = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                "capacity": size,
                "accessModes": modes,
                "hostPath": {"path": "/nowhere"},
                "storageClassName": "",
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {
                "resources": {"requests": size},
                "accessModes": modes,
                "volumeName": volume,
                "storageClassName": "",
            },
        },
    ]
    team.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))


def _ready_replicas(team: Namespace) -> int:
    adapters = team.llmd()["status"].get("adapters") or [{}]
    return int(adapters[0].get("readyReplicas", 0))


def test_deleting_it_leaves_nothing_behind(team: Namespace) -> None:
    team.apply(replicas=2, adapters=[{"name": "a", "source": "file:///adapters/a"}])
    team.wait_ready()
    team.kubectl("delete", "llmd", "smollm2")
    kinds = "pods,services,configmaps,poddisruptionbudgets,networkpolicies,secrets"
    wait_until(
        lambda: all(
            item["metadata"]["name"] == "kube-root-ca.crt" for item in team.get(kinds)["items"]
        )
    )


def test_another_operator_takes_over_without_a_write(
    cluster: ApiCluster, team: Namespace, operator: RunningOperator, runtimes: FakeRuntimes
) -> None:
    team.apply(replicas=2)
    team.wait_ready()
    operator.settled_writes(team.name)
    with RunningOperator(runtimes, namespace=INSTALLATION, lease_name="second") as second:
        second.look_at(team.name, "smollm2")
        assert second.settled_writes(team.name) == []
