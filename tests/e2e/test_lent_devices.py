"""Devices change hands on a real node: lent to a job, handed back to a replica, lent again."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import ROOT, Cluster
from tests.e2e.test_jobs import NAMESPACE, Job, samples

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
GPU = {"resource": "nvidia.com/gpu", "count": 1}
STEPS = 40
NAME, DATA = "lender", "berths"


@pytest.fixture
def lender(quickstart: Cluster) -> Iterator[Cluster]:
    """A deployment of one replica on a node of two devices, in name only."""
    give_gpus(2)
    quickstart.apply(
        {"apiVersion": "mizzen.dev/v1alpha1", "kind": "LLMDeployment",
         "metadata": {"name": NAME, "namespace": NAMESPACE},
         "spec": {"model": {"source": "pvc://models/smollm2", "maxModelLen": 512},
                  "replicas": 1, "accelerator": GPU, "engine": {"kvCacheGiB": 0.1}}},
        {"apiVersion": "v1", "kind": "ConfigMap",
         "metadata": {"name": DATA, "namespace": NAMESPACE}, "data": {"data.jsonl": samples()}},
    )  # fmt: skip
    quickstart.wait_for("llmd", NAME, "-n", NAMESPACE, until=serves(1))
    yield quickstart
    quickstart.kubectl("delete", "ftj,llmd", NAME, "-n", NAMESPACE)
    quickstart.kubectl("delete", "configmap", DATA, "-n", NAMESPACE)
    give_gpus(0)


def give_gpus(count: int) -> None:
    subprocess.run(
        [sys.executable, "-m", "hack.cluster", "fake-gpus", str(count)], cwd=ROOT, check=True
    )


def serves(replicas: int) -> Any:
    return lambda found: found.get("status", {}).get("ready") == f"{replicas}/{replicas}"


def scale(cluster: Cluster, replicas: int) -> None:
    cluster.kubectl("scale", f"llmd/{NAME}", "-n", NAMESPACE, f"--replicas={replicas}")


def exit_code(cluster: Cluster, generation: int) -> int:
    pod = cluster.get("pod", f"{NAME}-g{generation}-0", "-n", NAMESPACE)
    code: int = pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"]
    return code


def test_a_job_hands_its_device_to_a_replica_and_goes_on_when_it_is_free(lender: Cluster) -> None:
    job = Job.submit(
        lender, NAME,
        baseModel={"deployment": NAME},
        dataset=[{"name": "berths", "uri": f"configMap://{DATA}/data.jsonl"}],
        hyperparameters={"epochs": 50, "maxSteps": STEPS, "batchSize": 4, "microBatch": 4},
        checkpoint={"everySteps": STEPS},
        resources={"accelerator": GPU},
        spareCapacity={"enabled": True, "yieldWithinSeconds": 300},
    )  # fmt: skip
    job.wait_for_step(3, generation=1)
    scale(lender, 2)
    job.wait_for(lambda status: status.get("phase") == "Pending")
    lender.wait_for("llmd", NAME, "-n", NAMESPACE, until=serves(2))
    stopped_at = len(job.curve())
    assert 3 <= stopped_at < STEPS, "it was at work when its device was asked for"
    assert exit_code(lender, 1) == 75
    status = job.wait_for(lambda status: status["lending"]["preemptions"] == 1)
    assert status["checkpoint"]["step"] == stopped_at, "nothing it had done is lost"
    scale(lender, 1)
    status = job.finish()
    assert job.resumed_from(generation=2) == stopped_at
    assert [step for step, _ in job.curve()] == list(range(1, STEPS + 1))
    assert status.get("restarts", 0) == 0
    # The kubelet tells ends in whole seconds, rounded down: a quick yield took none.
    assert 0 <= status["lending"]["lastYieldSeconds"] <= 300
