"""A planted bad adapter among healthy neighbours: it is taken back, its deployment is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from hack.cluster.api_only import ApiCluster
from mizzen.operator.planning.canary import Answers
from mizzen.operator.planning.trial import Sides
from tests.api.test_llmdeployment import Namespace, runtimes, team, wait_until
from tests.fixtures.running_operator import RunningOperator, installation
from tests.fixtures.serving_world import FakeMetrics, FakeRuntimes

__all__ = ("runtimes", "team")  # fixtures
pytestmark = pytest.mark.api

INSTALLATION = "mizzen-trials"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def counted() -> FakeMetrics:
    return FakeMetrics()


@pytest.fixture(scope="module")
def operator(
    cluster: ApiCluster, runtimes: FakeRuntimes, counted: FakeMetrics
) -> Iterator[RunningOperator]:
    with (
        installation(cluster, INSTALLATION),
        RunningOperator(runtimes, counts=counted, namespace=INSTALLATION) as running,
    ):
        yield running


def make_claim(team: Namespace) -> None:
    """Make the claim on which the model and its adapters are, with a volume behind it."""
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"{team.name}-models"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": "/models"},
            "storageClassName": "",
            "claimRef": {"namespace": team.name, "name": "models"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
            "volumeName": f"{team.name}-models",
        },
    }
    for document in (volume, claim):
        team.kubectl("apply", "-f", "-", stdin=json.dumps(document))


def job_status(team: Namespace, name: str) -> Json:
    status: Json = team.get("ftj", name).get("status") or {}
    return status


def state(team: Namespace, name: str) -> tuple[str, str]:
    """Return the job's phase and why it is promoted or is not."""
    status = job_status(team, name)
    reasons = [c["reason"] for c in status.get("conditions", []) if c["type"] == "Promoted"]
    return status.get("phase", ""), "".join(reasons)


def publish(team: Namespace, name: str, *, digest: str, at: str, **promotion: Any) -> None:
    """Make a job and play its trainer: its result is published, and good by its own gate."""
    spec = {
        "baseModel": {"source": "pvc://models/smollm2"},
        "dataset": [{"name": "tickets", "uri": "configMap://tickets/data.jsonl"}],
        "promotion": {"deployment": "smollm2", "adapter": "support"} | promotion,
    }
    document = {
        "apiVersion": "mizzen.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }
    team.kubectl("apply", "-f", "-", stdin=json.dumps(document))
    uri = f"pvc://models/adapters/{name}"
    published = {
        "artifact": {"uri": uri, "digest": digest, "kind": "adapter", "bytes": 9},
        "conditions": [
            {
                **{"type": "Published", "status": "True", "reason": "Published"},
                **{"message": "It is.", "lastTransitionTime": at, "observedGeneration": 1},
            }
        ],
    }

    def is_taken() -> bool:
        # The operator may be about to write that the job has no claim to run with.
        if "artifact" not in job_status(team, name):
            patch = json.dumps({"status": published})
            team.kubectl(
                *("patch", "ftj", name, "--subresource=status", "--type=merge", "-p", patch)
            )
        return state(team, name)[0] in ("Promoting", "Succeeded")

    wait_until(is_taken)


def adapters(team: Namespace) -> list[tuple[str, str, bool]]:
    """Return whose adapter is served by how many replicas, and whether it is on trial."""
    listed = team.llmd()["status"].get("adapters", [])
    return [(a["job"], a["readyReplicas"], a.get("onTrial", False)) for a in listed]


def test_a_planted_bad_adapter_is_taken_back_and_its_deployment_stays(
    team: Namespace, counted: FakeMetrics
) -> None:
    make_claim(team)
    team.apply(replicas=2, model={"source": "pvc://models/smollm2"})
    team.wait_ready()
    publish(team, "one", digest="sha256:1", at="2026-01-01T00:00:00Z")
    wait_until(lambda: state(team, "one") == ("Succeeded", "Promoted"))
    before, revision = team.uids(), team.llmd()["status"]["revision"]
    trial = {"holdSeconds": 86400, "errorRatio": 0.1}
    publish(team, "two", digest="sha256:2", at="2026-01-01T01:00:00Z", replaces="one", trial=trial)
    wait_until(lambda: adapters(team) == [("two", 2, True)])
    assert state(team, "two") == ("Promoting", "Promoting")
    counted.trials = {
        ("support", "sha256:2"): Sides(Answers(requests=20, failures=15), Answers(requests=200))
    }
    wait_until(lambda: state(team, "two") == ("Failed", "RolledBack"))
    wait_until(lambda: adapters(team) == [("one", 2, False)])
    (why,) = [c["message"] for c in job_status(team, "two")["conditions"] if c["type"] == "Failed"]
    assert "15 of its 20 requests failed and 0 of the deployment's 200 others" in why
    events = team.get("events", "--field-selector=reason=RolledBack")["items"]
    assert {event["involvedObject"]["name"] for event in events} == {"two"}
    assert team.ready()[0] == "True"
    assert team.uids() == before
    assert team.llmd()["status"]["revision"] == revision
    assert state(team, "one")[0] == "Succeeded"
