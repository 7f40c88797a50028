"""A real Kueue admits, holds back and preempts jobs on a real API server and scheduler.

The whole operator runs. Trainers are played: their pods run on simulated nodes, and a test says
when and how they end. `make kueue` builds Kueue and runs this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from hack.cluster.api_only import ApiCluster
from hack.kueue.server import Kueue
from mizzen.operator.desired import labels
from tests.fixtures.played_trainers import (
    PlayedTrainers,
    claim_with_volume,
    ended,
    wait_until,
    yielded,
)
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeRuntimes
from tests.kueue.journal import Journal

INSTALLATION = "mizzen-queues"
GPU = "nvidia.com/gpu"
KUEUE = "kueue.x-k8s.io/v1beta2"
PRIORITY = "kueue.x-k8s.io/priority-class"
DONE = {
    "phase": "Succeeded", "step": 40, "totalSteps": 40, "loss": 1.5, "generation": 1,
    "artifact": {"kind": "adapter", "path": "/mnt/pvc/models/adapters/a/0123",
                 "digest": "sha256:0123", "bytes": 99},
}  # fmt: skip
Json = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ApiCluster]:
    with ApiCluster() as running, Kueue(running):
        running.add_nodes(2, gpus=8)
        running.kubectl("apply", "--server-side", "-f", "manifests/crds")
        running.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=300s")
        yield running


@pytest.fixture(scope="module", autouse=True)
def operator(cluster: ApiCluster) -> Iterator[RunningOperator]:
    with (
        installation(cluster, INSTALLATION),
        RunningOperator(
            FakeRuntimes(), trainers=PlayedTrainers(), namespace=INSTALLATION
        ) as running,
    ):
        yield running


class Team:
    """A namespace with one queue, and the words its tests need."""

    def __init__(self, cluster: ApiCluster, name: str, *, cluster_queue: str = "") -> None:
        self.cluster, self.name = cluster, name
        self.cluster_queue = cluster_queue or name
        for document in claim_with_volume(f"models-{name}"):
            self.apply(document)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, stdin=stdin)

    def apply(self, *documents: Json) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(documents))

    def grant(self, gpus: int) -> None:
        """Have a queue `research` that may use so many GPUs."""
        amounts = {"cpu": 8, "memory": "64Gi", GPU: gpus}
        quotas = [{"name": name, "nominalQuota": amount} for name, amount in amounts.items()]
        group = {
            "coveredResources": list(amounts),
            "flavors": [{"name": "any-node", "resources": quotas}],
        }
        self.apply(
            _kueue("ResourceFlavor", "any-node", {}),
            _kueue("ClusterQueue", self.cluster_queue, {
                "namespaceSelector": {}, "resourceGroups": [group],
                "preemption": {"withinClusterQueue": "LowerPriority"},
            }),
            _kueue("LocalQueue", "research", {"clusterQueue": self.cluster_queue}),
        )  # fmt: skip

    def train(self, name: str, *, workers: int = 1, priority: str = "", **spec: Any) -> None:
        patch = {"labels": {PRIORITY: priority}} if priority else {}
        self.apply({
            "apiVersion": "mizzen.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name},
            "spec": {
                "queue": "research",
                "baseModel": {"source": "pvc://models/smollm2"},
                "dataset": [{"name": "tickets", "uri": "pvc://models/data.jsonl"}],
                "resources": {"accelerator": {"resource": GPU, "count": 1}},
                "workers": {"min": workers, "max": workers},
                "podTemplatePatch": patch,
            } | spec,
        })  # fmt: skip

    def status(self, job: str) -> Json:
        found: Json = json.loads(self.kubectl("get", "ftj", job, "-o", "json"))
        return found.get("status", {})

    def condition(self, job: str, type_: str) -> Json:
        conditions = self.status(job).get("conditions", [])
        return next((each for each in conditions if each["type"] == type_), {})

    def admitted(self, job: str) -> tuple[str, str]:
        found = self.condition(job, "Admitted")
        return found.get("status", ""), found.get("reason", "")

    def pods(self) -> dict[str, Json]:
        found = json.loads(self.kubectl("get", "pods", "-o", "json"))
        return {pod["metadata"]["name"]: pod for pod in found["items"]}

    def is_running(self, *names: str) -> bool:
        pods = self.pods()
        return all(pods.get(name, {}).get("status", {}).get("phase") == "Running" for name in names)

    def is_held(self, *names: str) -> bool:
        """Whether the pods are there and Kueue's gate is on them."""
        pods = self.pods()
        return all(
            name in pods and labels.KUEUE_GATE in labels.gates_of(pods[name]) for name in names
        )

    def workloads(self) -> dict[str, dict[str, str]]:
        """Return the conditions of Kueue's record of each group."""
        found = json.loads(self.kubectl("get", "workloads", "-o", "json"))
        return {
            each["metadata"]["name"]: {
                condition["type"]: condition["status"]
                for condition in each.get("status", {}).get("conditions", [])
            }
            for each in found["items"]
        }

    def is_finished(self, workload: str) -> bool:
        return self.workloads().get(workload, {}).get("Finished") == "True"

    def end(self, status: Json, *names: str) -> None:
        for name in names:
            self.kubectl("patch", "pod", name, "--subresource=status", "--type=merge",
                         "-p", json.dumps({"status": status}))  # fmt: skip

    def succeed(self, *names: str) -> None:
        self.end(ended("Succeeded", exit_code=0, words=DONE), *names)


def _kueue(kind: str, name: str, spec: Json) -> Json:
    return {"apiVersion": KUEUE, "kind": kind, "metadata": {"name": name}, "spec": spec}


@pytest.fixture
def team(cluster: ApiCluster, request: pytest.FixtureRequest) -> Team:
    name = f"team-{request.node.originalname.replace('_', '-').removeprefix('test-')}"[:40]
    return Team(cluster, cluster.create_namespace(name.strip("-")))


def test_the_pods_of_a_generation_are_admitted_together_and_leave_nothing_behind(
    team: Team,
) -> None:
    team.grant(2)
    team.train("tune", workers=2)
    wait_until(lambda: team.is_running("tune-g1-0", "tune-g1-1"))
    wait_until(lambda: team.admitted("tune") == ("True", "Admitted"))
    assert team.workloads()["tune-g1"]["Admitted"] == "True"

    team.succeed("tune-g1-1", "tune-g1-0")
    wait_until(lambda: team.status("tune")["phase"] == "Succeeded")
    wait_until(lambda: team.is_finished("tune-g1"))
    wait_until(lambda: not any("finalizers" in pod["metadata"] for pod in team.pods().values()))
    team.kubectl("delete", "ftj", "tune")
    wait_until(lambda: not team.pods() and not team.workloads())


def test_a_job_without_quota_says_for_which_queue_and_what_it_waits(team: Team) -> None:
    team.grant(1)
    team.train("tune", workers=2)
    wait_until(lambda: team.admitted("tune") == ("False", "WaitsInQueue"))
    wait_until(lambda: "quota" in team.condition("tune", "Admitted")["message"])
    told = team.condition("tune", "Admitted")["message"]
    assert told.startswith("The job waits in queue research: ")
    assert f"quota for {GPU}" in told
    assert team.is_held("tune-g1-0", "tune-g1-1"), "one of the two would have had room"
    assert team.status("tune")["phase"] == "Pending"
    assert team.condition("tune", "Stalled") == {}

    team.grant(2)
    wait_until(lambda: team.is_running("tune-g1-0", "tune-g1-1"))
    wait_until(lambda: team.admitted("tune")[0] == "True")


@pytest.fixture
def journal(team: Team) -> Iterator[None]:
    with Journal(team.cluster, team.name):
        yield


@pytest.mark.usefixtures("journal")
def test_a_preempted_job_goes_on_from_its_checkpoint_as_another_group(team: Team) -> None:
    team.apply(
        *(
            {"apiVersion": KUEUE, "kind": "WorkloadPriorityClass", "metadata": {"name": name},
             "value": value}
            for name, value in (("low", 1), ("high", 2))
        )
    )  # fmt: skip
    team.grant(2)
    team.train("tune", workers=2, priority="low")
    wait_until(lambda: team.is_running("tune-g1-0", "tune-g1-1"))
    wait_until(lambda: "checkpoint" in team.status("tune"))

    team.train("urgent", priority="high")
    wait_until(lambda: team.admitted("tune") == ("False", "Yielded"))
    assert team.status("tune")["phase"] == "Yielding"
    team.end(yielded(), "tune-g1-0", "tune-g1-1")
    wait_until(lambda: team.is_running("urgent-g1-0"))
    wait_until(lambda: team.is_held("tune-g2-0", "tune-g2-1"))
    wait_until(lambda: team.admitted("tune") == ("False", "WaitsInQueue"))
    status = team.status("tune")
    assert (status["generation"], status["restarts"]) == (2, 0)
    # Kueue lets the pods go when they have ended, perhaps before their last words are read.
    assert status["checkpoint"]["step"] in (2, 7)
    assert status["lending"]["preemptions"] == 1
    wait_until(lambda: not {"tune-g1-0", "tune-g1-1"} & set(team.pods()))
    wait_until(lambda: "tune-g1" not in team.workloads())

    team.succeed("urgent-g1-0")
    wait_until(lambda: team.is_running("tune-g2-0", "tune-g2-1"))
    wait_until(lambda: team.admitted("tune")[0] == "True")


def test_a_crashed_generation_gives_its_quota_to_the_next(team: Team) -> None:
    team.grant(1)
    team.train("tune")
    wait_until(lambda: team.is_running("tune-g1-0"))
    words = {"reason": "InternalError", "message": "It fell."}
    team.end(ended("Failed", exit_code=1, words=words), "tune-g1-0")
    wait_until(lambda: team.is_running("tune-g2-0"))
    assert team.is_finished("tune-g1")
    assert team.status("tune")["restarts"] == 1


def test_a_job_that_waits_can_be_suspended_and_goes_on(team: Team) -> None:
    team.grant(1)
    team.train("tune", workers=2)
    wait_until(lambda: team.admitted("tune") == ("False", "WaitsInQueue"))
    team.train("tune", workers=2, suspend=True)
    wait_until(lambda: team.status("tune")["phase"] == "Suspended")
    wait_until(lambda: not team.pods() and not team.workloads())
    team.grant(2)
    team.train("tune", workers=2, suspend=False)
    wait_until(lambda: team.is_running("tune-g2-0", "tune-g2-1"))


def test_a_job_deleted_while_it_waits_leaves_nothing_behind(team: Team) -> None:
    team.grant(1)
    team.train("tune", workers=2)
    wait_until(lambda: team.admitted("tune") == ("False", "WaitsInQueue"))
    team.kubectl("delete", "ftj", "tune")
    wait_until(lambda: not team.pods() and not team.workloads())


def test_a_queue_that_is_not_there_is_named_and_waited_for(team: Team) -> None:
    team.train("tune")
    wait_until(lambda: team.condition("tune", "Ready").get("reason") == "QueueNotFound")
    assert team.pods() == {}
    team.grant(1)
    wait_until(lambda: team.is_running("tune-g1-0"))


def test_pods_that_kueue_does_not_look_at_are_held_back_and_say_so(cluster: ApiCluster) -> None:
    team = Team(cluster, "kube-system", cluster_queue="system")
    team.grant(1)
    team.train("tune")
    wait_until(lambda: team.condition("tune", "Ready").get("reason") == "NotTakenByKueue")
    assert team.is_held("tune-g1-0")
    assert team.workloads() == {}
    team.kubectl("delete", "ftj", "tune")
    wait_until(lambda: not team.pods())
