"""A job whose trainer is killed, or suspended, goes on to the loss curve of one left alone."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cluster, kill_container

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]
NAMESPACE = "quickstart"
DATA = "ports"
STEPS = 16
SPEC = {
    "method": "sft",
    "adaptation": {"type": "lora", "rank": 4, "alpha": 8},
    "baseModel": {"deployment": "smollm2"},
    "dataset": [{"name": "ports", "uri": f"configMap://{DATA}/data.jsonl"}],
    "processing": {"maxSeqLen": 64, "holdoutRatio": 0.1},
    "hyperparameters": {"epochs": 50, "maxSteps": STEPS, "batchSize": 4, "microBatch": 4},
    "checkpoint": {"everySteps": 2},
    "promotion": {"strategy": "None"},
}
Curve = list[tuple[int, float]]


def samples() -> str:
    """Dialogues that differ in length, so that an order other than the same one shows."""
    lines = []
    for number in range(40):
        answer = f"The harbour master, {'day and night, ' * (number % 5)}on channel {number % 60}."
        question = {"role": "user", "content": f"Who answers at berth {number}?"}
        messages = [question, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """A FineTuneJob, its folder on the claim, and the processes of its trainer on this host."""

    cluster: Cluster
    name: str

    @classmethod
    def submit(cls, cluster: Cluster, name: str, **fields: Any) -> "Job":
        metadata = {"name": name, "namespace": NAMESPACE}
        cluster.apply(
            {"apiVersion": "mizzen.dev/v1alpha1", "kind": "FineTuneJob",
             "metadata": metadata, "spec": SPEC | fields}
        )  # fmt: skip
        return cls(cluster, name)

    def wait_for(self, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the status as soon as it is as wanted."""
        found = self.cluster.wait_for(
            "ftj", self.name, "-n", NAMESPACE, until=lambda job: until(job.get("status", {}))
        )
        status: dict[str, Any] = found["status"]
        return status

    def finish(self) -> dict[str, Any]:
        status = self.wait_for(lambda status: status.get("phase") in ("Succeeded", "Failed"))
        assert status["phase"] == "Succeeded", status
        return status

    @property
    def metrics(self) -> Path:
        volume = self.cluster.get("persistentvolume", "quickstart-models")
        uid = self.cluster.get("ftj", self.name, "-n", NAMESPACE)["metadata"]["uid"]
        folder = f"{NAMESPACE}-{self.name}-{uid[:8]}"
        return Path(volume["spec"]["hostPath"]["path"]) / "jobs" / folder / "metrics.jsonl"

    def curve(self) -> Curve:
        records = map(json.loads, self.metrics.read_text().splitlines())
        return [(record["step"], record["loss"]) for record in records]

    def wait_for_step(self, step: int, *, generation: int) -> str:
        """Wait until this generation has made the step; return its container's id."""
        pod = f"{self.name}-g{generation}-0"
        self.wait_for(lambda status: status.get("generation") == generation)
        found = self.cluster.wait_for(
            "pod", pod, "-n", NAMESPACE,
            until=lambda pod: pod["status"]["phase"] == "Running",
        )  # fmt: skip
        metrics, deadline = self.metrics, time.monotonic() + 900
        while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
            assert time.monotonic() < deadline, f"{pod} did not come to step {step}"
            time.sleep(0.02)
        container: str = found["status"]["containerStatuses"][0]["containerID"]
        return container.removeprefix("containerd://")

    def resumed_from(self, *, generation: int) -> int:
        log = self.cluster.kubectl("logs", f"{self.name}-g{generation}-0", "-n", NAMESPACE)
        found = re.search(r"Resuming from step (\d+)", log)
        assert found is not None, log
        return int(found[1])


@pytest.fixture(scope="module")
def undisturbed(quickstart: Cluster) -> Iterator[Curve]:
    """The loss curve of a job that nobody touched."""
    quickstart.apply(
        {"apiVersion": "v1", "kind": "ConfigMap",
         "metadata": {"name": DATA, "namespace": NAMESPACE}, "data": {"data.jsonl": samples()}}
    )  # fmt: skip
    job = Job.submit(quickstart, "left-alone")
    assert job.finish().get("restarts", 0) == 0
    curve = job.curve()
    assert [step for step, _ in curve] == list(range(1, STEPS + 1))
    yield curve
    quickstart.kubectl(
        "delete", "ftj", "left-alone", "killed", "suspended", "-n", NAMESPACE, "--ignore-not-found"
    )
    quickstart.kubectl("delete", "configmap", DATA, "-n", NAMESPACE)


def test_a_trainer_killed_twice_ends_with_the_same_loss_curve(
    quickstart: Cluster, undisturbed: Curve
) -> None:
    job = Job.submit(quickstart, "killed")
    kill_container(job.wait_for_step(3, generation=1))
    kill_container(job.wait_for_step(7, generation=2))
    status = job.finish()
    assert status["restarts"] == 2
    assert status["generation"] == 3
    assert status["artifact"]["digest"].startswith("sha256:")
    assert 2 <= job.resumed_from(generation=2) < job.resumed_from(generation=3) < STEPS
    assert job.curve() == undisturbed


def test_a_suspended_job_goes_on_where_it_stopped(quickstart: Cluster, undisturbed: Curve) -> None:
    job = Job.submit(quickstart, "suspended")
    job.wait_for_step(3, generation=1)
    suspend(quickstart, True)
    status = job.wait_for(lambda status: status.get("phase") == "Suspended")
    stopped_at = len(job.curve())
    assert 3 <= stopped_at < STEPS
    assert status["checkpoint"]["step"] == stopped_at
    suspend(quickstart, False)
    status = job.finish()
    assert status["generation"] == 2
    assert status.get("restarts", 0) == 0, "to be suspended is not to crash"
    assert job.curve() == undisturbed


def suspend(cluster: Cluster, wanted: bool) -> None:
    patch = json.dumps({"spec": {"suspend": wanted}})
    cluster.kubectl("patch", "ftj", "suspended", "-n", NAMESPACE, "--type=merge", "-p", patch)
