"""Devices change hands on a real API server and scheduler: replicas, a borrower, a gang.

The whole operator runs. Trainers are played: their pods run on a simulated node, what they are
asked is kept, and a test says when and how they end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import yaml

from hack.cluster import fake_nodes
from hack.cluster.api_only import ApiCluster
from mizzen.operator.controllers.capacity_usage import read_usage
from mizzen.operator.desired import labels
from mizzen.operator.planning import generations, preemption
from tests.fixtures.played_trainers import (
    PlayedTrainers,
    claim_with_volume,
    ended,
    wait_until,
    yielded,
)
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeRuntimes

pytestmark = pytest.mark.api

INSTALLATION = "mizzen-lending"
GPU = "example.com/gpu"
NODE = "lender"
DEVICES = 4
TAINT = {"key": "lending", "value": "only", "effect": "NoSchedule"}
Json = dict[str, Any]
DONE: Json = {
    "phase": "Succeeded", "step": 40, "totalSteps": 40,
    "artifact": {"kind": "adapter", "path": "/mnt/pvc/models/adapters/urgent/0123",
                 "digest": "sha256:0123", "bytes": 99},
}  # fmt: skip


@pytest.fixture(scope="module")
def trainers() -> PlayedTrainers:
    return PlayedTrainers()


@pytest.fixture(scope="module")
def operator(cluster: ApiCluster, trainers: PlayedTrainers) -> Iterator[RunningOperator]:
    with (
        installation(cluster, INSTALLATION),
        RunningOperator(
            FakeRuntimes(),
            trainers=trainers,
            namespace=INSTALLATION,
            lease_name=INSTALLATION,
            lending_s=1.0,
        ) as running,
    ):
        yield running


class Team:
    """One test's namespace beside one node of four devices, with the words its tests need."""

    def __init__(self, cluster: ApiCluster, name: str, trainers: PlayedTrainers) -> None:
        self.cluster, self.name, self.trainers = cluster, name, trainers

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.name, *arguments, stdin=stdin)

    def apply(self, document: Json) -> None:
        self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(document))

    def serve(self, replicas: int) -> None:
        spec = {
            "model": {"source": "file:///models/smollm2"},
            "accelerator": {"resource": GPU},
            "replicas": replicas,
            "podTemplatePatch": {"tolerations": [TAINT]},
        }
        self.apply(_resource("LLMDeployment", "chat", spec))

    def train(self, count: int, *, job: str = "tune", **spec: Any) -> None:
        self.apply(
            _resource(
                "FineTuneJob",
                job,
                {
                    "baseModel": {"source": "pvc://models/smollm2"},
                    "dataset": [{"name": "tickets", "uri": "pvc://models/data.jsonl"}],
                    "resources": {"accelerator": {"resource": GPU, "count": count}},
                    "podTemplatePatch": {"tolerations": [TAINT]},
                }
                | spec,
            )
        )

    def status(self, kind: str, name: str) -> Json:
        found: Json = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        return found.get("status", {})

    def is_serving(self, replicas: int) -> bool:
        return self.status("llmd", "chat").get("ready") == f"{replicas}/{replicas}"

    def serving_reason(self) -> str:
        return self._condition("llmd", "chat", "Ready")[1]

    def admitted(self, job: str = "tune") -> tuple[str, str]:
        return self._condition("ftj", job, "Admitted")

    def _condition(self, kind: str, name: str, type_: str) -> tuple[str, str]:
        for condition in self.status(kind, name).get("conditions", []):
            if condition["type"] == type_:
                return condition["status"], condition["reason"]
        return "", ""

    def used_s(self) -> float:
        """Return how many device-seconds this namespace has used, as the Lease tells."""
        where = ("-n", INSTALLATION, "get", "lease", INSTALLATION, "-o", "json")
        lease = json.loads(self.cluster.kubectl(*where))
        text = lease["metadata"].get("annotations", {}).get(labels.USAGE, "")
        return read_usage(text).used_s.get(GPU, {}).get(self.name, 0.0)

    def pods(self, role: str) -> dict[str, Json]:
        found = json.loads(self.kubectl("get", "pods", "-l", f"{labels.ROLE}={role}", "-o", "json"))
        return {pod["metadata"]["name"]: pod for pod in found["items"]}

    def gated(self) -> list[str]:
        """Return the replicas' pods that wait at our gate."""
        return [
            name
            for name, pod in self.pods(labels.ROLE_RUNTIME).items()
            if {"name": labels.CAPACITY_GATE} in pod["spec"].get("schedulingGates", [])
        ]

    def is_training(self, pod: str) -> bool:
        found = self.pods(labels.ROLE_TRAINER).get(pod, {})
        return found.get("status", {}).get("phase") == "Running"

    def is_asked(self, pod: str) -> bool:
        """Whether the trainer in this pod was asked to yield."""
        return self.trainers.is_asked(self.pods(labels.ROLE_TRAINER)[pod])

    def yield_now(self, pod: str) -> None:
        """Have the trainer commit a checkpoint and leave."""
        self._play(pod, yielded())

    def finish_now(self, pod: str) -> None:
        """Have the trainer publish its result and end."""
        self._play(pod, ended("Succeeded", exit_code=0, words=DONE))

    def _play(self, pod: str, status: Json) -> None:
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge",
                     "-p", json.dumps({"status": status}))  # fmt: skip


@pytest.fixture
def team(
    cluster: ApiCluster, namespace: str, operator: RunningOperator, trainers: PlayedTrainers
) -> Iterator[Team]:
    made = Team(cluster, namespace, trainers)
    node = fake_nodes.build_node(NODE, gpus=0, cpus=64, memory_gib=512, tainted=False)
    for amounts in node["status"].values():
        amounts[GPU] = str(DEVICES)
    node["spec"]["taints"] = [TAINT]
    cluster.kube.create("/api/v1/nodes", node)
    volume = f"models-{namespace}"
    for document in claim_with_volume(volume):
        made.apply(document)
    yield made
    made.kubectl("delete", "llmd,ftj", "--all")
    made.kubectl("delete", "pods", "--all", "--force")
    cluster.kubectl("delete", "node", NODE)
    made.kubectl("delete", "pvc", "--all", "--wait=false")
    cluster.kubectl("delete", "pv", volume, "--wait=false")


def _resource(kind: str, name: str, spec: Json) -> Json:
    metadata = {"name": name}
    return {"apiVersion": "mizzen.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}


def test_a_borrower_leaves_for_a_replica_and_comes_back_when_it_is_gone(team: Team) -> None:
    team.serve(1)
    wait_until(lambda: team.is_serving(1))
    team.train(3, spareCapacity={"enabled": True, "yieldWithinSeconds": 300})
    wait_until(lambda: team.is_training("tune-g1-0"))
    wait_until(lambda: team.admitted()[0] == "True")
    assert team.status("ftj", "tune")["lending"]["nodes"] == [NODE]
    wait_until(lambda: team.used_s() > 0)

    team.serve(2)
    wait_until(lambda: team.is_asked("tune-g1-0"))
    assert len(team.gated()) == 1, "no node is taken from the trainer while it commits"
    wait_until(lambda: team.admitted() == ("False", "Yielded"))
    wait_until(lambda: team.serving_reason() == "WaitsForDevices")
    team.yield_now("tune-g1-0")
    wait_until(lambda: team.is_serving(2))
    assert not team.gated()

    wait_until(lambda: team.admitted() == ("False", "NoSpareCapacity"))
    status = team.status("ftj", "tune")
    assert (status["phase"], status["lending"]["preemptions"]) == ("Pending", 1)
    assert status["checkpoint"]["step"] == 7
    assert "tune-g2-0" not in team.pods(labels.ROLE_TRAINER)

    team.serve(1)
    wait_until(lambda: team.is_training("tune-g2-0"))
    wait_until(lambda: team.admitted()[0] == "True")
    assert team.is_serving(1)


def test_a_gang_waits_until_there_is_room_for_all_of_it(team: Team) -> None:
    team.serve(1)
    wait_until(lambda: team.is_serving(1))
    team.train(2, workers={"min": 2, "max": 2})
    wait_until(lambda: team.admitted() == ("False", "NoSpareCapacity"))
    assert team.pods(labels.ROLE_TRAINER) == {}, "one of the two would have had room"

    team.serve(0)
    wait_until(lambda: team.is_training("tune-g1-0") and team.is_training("tune-g1-1"))
    wait_until(lambda: team.admitted()[0] == "True")


def test_an_elastic_gang_starts_with_what_there_is_shrinks_for_a_replica_and_grows_again(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    team.serve(1)
    wait_until(lambda: team.is_serving(1))
    lends = {"enabled": True, "yieldWithinSeconds": 300}
    team.train(1, workers={"min": 1, "max": 4}, spareCapacity=lends)
    wait_until(lambda: all(team.is_training(f"tune-g1-{rank}") for rank in range(3)))
    assert team.status("ftj", "tune")["workers"] == 3

    team.serve(2)
    wait_until(lambda: team.is_asked("tune-g1-0"))
    team.yield_now("tune-g1-0")  # the operator has the others follow
    wait_until(lambda: team.is_serving(2))
    wait_until(lambda: team.is_training("tune-g2-0") and team.is_training("tune-g2-1"))
    assert "tune-g2-2" not in team.pods(labels.ROLE_TRAINER)

    team.serve(0)
    wait_until(lambda: len(team.pods(labels.ROLE_RUNTIME)) == 0)
    assert not team.is_asked("tune-g2-0"), "so short a run is not ended for more room"
    monkeypatch.setattr(generations, "RESIZE_EVERY", timedelta(0))
    wait_until(lambda: team.is_asked("tune-g2-0"))
    team.yield_now("tune-g2-0")
    wait_until(lambda: all(team.is_training(f"tune-g3-{rank}") for rank in range(4)))
    assert team.status("ftj", "tune")["lending"]["preemptions"] == 1


STRONGER: dict[str, Json] = {
    "keeps what it gets": {},
    "borrows with a higher priority": {"spareCapacity": {"enabled": True}, "priority": 5},
}


@pytest.mark.parametrize("stronger", STRONGER.values(), ids=STRONGER)
def test_a_borrower_leaves_for_a_job_that(
    team: Team, monkeypatch: pytest.MonkeyPatch, stronger: Json
) -> None:
    team.train(3, spareCapacity={"enabled": True, "yieldWithinSeconds": 300})
    wait_until(lambda: team.is_training("tune-g1-0"))
    team.train(3, job="urgent", **stronger)
    wait_until(lambda: team.admitted("urgent") == ("False", "NoSpareCapacity"))
    assert not team.is_asked("tune-g1-0"), "no job is ended for another as soon as it has begun"

    monkeypatch.setattr(preemption, "MIN_RUN", timedelta(0))
    wait_until(lambda: team.is_asked("tune-g1-0"))
    wait_until(lambda: team.admitted("urgent") == ("False", "WaitsForDevices"))
    assert "urgent-g1-0" not in team.pods(labels.ROLE_TRAINER), "the other one still commits"
    team.yield_now("tune-g1-0")
    wait_until(lambda: team.is_training("urgent-g1-0"))
    wait_until(lambda: team.admitted() == ("False", "NoSpareCapacity"))
    assert team.status("ftj", "tune")["lending"]["preemptions"] == 1
    assert team.status("ftj", "tune")["checkpoint"]["step"] == 7
    assert not team.is_asked("urgent-g1-0"), "who had to leave does not have the other leave"

    team.finish_now("urgent-g1-0")
    wait_until(lambda: team.is_training("tune-g2-0"))
    wait_until(lambda: team.admitted()[0] == "True")
    assert team.status("ftj", "urgent")["phase"] == "Succeeded"


def test_a_borrower_that_does_not_leave_is_ended_and_borrows_no_more(team: Team) -> None:
    team.serve(1)
    wait_until(lambda: team.is_serving(1))
    team.train(3, spareCapacity={"enabled": True, "yieldWithinSeconds": 5})
    wait_until(lambda: team.is_training("tune-g1-0"))

    team.serve(2)
    wait_until(lambda: "tune-g1-0" not in team.pods(labels.ROLE_TRAINER))
    wait_until(lambda: team.is_serving(2))
    team.serve(1)
    wait_until(lambda: team.admitted() == ("False", "YieldTooSlow"))
    assert team.status("ftj", "tune")["lending"]["slowestYieldSeconds"] > 5
    assert team.pods(labels.ROLE_TRAINER) == {}

    team.train(3, spareCapacity={"enabled": True, "yieldWithinSeconds": 600})
    wait_until(lambda: team.is_training("tune-g2-0"))
