"""A job on the weights of a replica, on a real API server and beside a real runtime server."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.config import kube_config

from hack.cluster.api_only import ApiCluster
from mizzen.operator.config import OperatorConfig
from mizzen.operator.controllers.finetunejob import reconcile
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.desired.labels import IN_SERVICE_GATE
from mizzen.operator.desired.serving import PodPlace, Serving, build_pod
from mizzen.operator.engine.key import Key
from mizzen.operator.handlers import FOLLOWED
from mizzen.operator.kube.connect import open_client
from mizzen.operator.kube.relist import relist
from mizzen.operator.kube.transport import HttpTransport
from mizzen.operator.main import Parts, assemble
from mizzen.operator.status.loans import Lender, Loan, parse_lender
from mizzen.operator.trainers import LoanRefusedError, TrainerClient
from tests.fixtures.custom_resources import Document, apply, deployment, job
from tests.fixtures.runtime_server import running_tiny_model
from tests.fixtures.train_runs import write_samples

pytestmark = pytest.mark.api

NOW = datetime(2026, 1, 1, tzinfo=UTC)
CLAIM = "/mnt/pvc/models"
WAIT_S = 500.0
LENDS = {"engine": {"lendsWeights": True}}
LOAN: Document = {
    "mode": "Loan",
    "dataset": [{"name": "colours", "uri": "pvc://models/data.jsonl"}],
    "processing": {"maxSeqLen": 64, "holdoutRatio": 0.2},
    "hyperparameters": {"maxSteps": 8, "batchSize": 4, "microBatch": 2, "learningRate": 0.01},
    "evaluation": {"suites": [{"name": "holdout"}]},
    "failure": {"backoffLimit": 1},
}
DONE = {
    "phase": "Succeeded", "step": 8, "totalSteps": 8,
    "evaluation": [{"suite": "holdout", "base": 10.0, "candidate": 8.0,
                    "regressionRatio": -0.2, "passed": True}],
    "artifact": {"kind": "adapter", "path": f"{CLAIM}/adapters/support/0123",
                 "digest": "sha256:0123", "bytes": 99},
}  # fmt: skip


@dataclass
class PlayedReplicas:
    """Replicas by address that say what a test has them say."""

    loans: dict[str, Loan | None] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    refusal: str = ""
    lent: list[tuple[str, int]] = field(default_factory=list)  # address, generation
    taken_back: list[str] = field(default_factory=list)

    async def lender(self, pod_ip: str) -> Lender | None:
        if pod_ip in self.silent:
            return None
        return Lender(self.loans.get(pod_ip), self.in_flight.get(pod_ip, 0))

    async def lend(self, pod_ip: str, job: Document) -> bool:
        if self.refusal:
            raise LoanRefusedError(self.refusal)
        self.lent.append((pod_ip, job["generation"]))
        directory = job["checkpoint"]["directory"]
        self.loans[pod_ip] = Loan(job["job"], job["generation"], directory, {"phase": "Running"})
        return True

    async def take_back(self, pod_ip: str) -> bool:
        self.taken_back.append(pod_ip)
        return True

    def end(self, pod_ip: str, code: int, **said: Any) -> None:
        loan = self.loans[pod_ip]
        assert loan is not None
        ended = (NOW - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.loans[pod_ip] = replace(loan, exit_code=code, ended_at=ended, **said)


class Scene:
    """One deployment and one job in a namespace, looked at as often as a test says."""

    def __init__(self, cluster: ApiCluster, namespace: str, parts: Parts) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.replicas = PlayedReplicas()
        self.parts = parts
        self.ask(self.replicas)

    def ask(self, trainers: Any) -> None:
        """Have the operator talk to these replicas."""
        self.parts = replace(self.parts, facts=replace(self.parts.facts, trainers=trainers))

    def serve(self, *addresses: str, **spec: Any) -> None:
        """Have a deployment with a replica in service at each address."""
        made = apply(self.cluster, self.namespace, deployment(**spec))
        serving = Serving(
            name="smollm2",
            namespace=self.namespace,
            uid=made["metadata"]["uid"],
            spec=LLMDeploymentSpec.model_validate(made["spec"]),
            image="registry/runtime:1",
        )
        for slot, address in enumerate(addresses):
            pod = build_pod(serving, PodPlace(revision="0123", slot=slot, rank=0))
            # The claim has no volume, so no scheduler or kubelet ever touches the pod.
            apply(self.cluster, self.namespace, pod)
            conditions = [
                {"type": type_, "status": "True"}
                for type_ in ("Ready", "ContainersReady", IN_SERVICE_GATE)
            ]
            container = {"name": "runtime", "image": "r", "imageID": "r", "restartCount": 0}
            container |= {"ready": True, "started": True, "state": {"running": {}}}
            status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
            status |= {"containerStatuses": [container]}
            document = {"status": status | {"conditions": conditions}}
            self.kubectl("patch", "pod", pod["metadata"]["name"], "--subresource=status",
                         "--type=merge", "-p", json.dumps(document))  # fmt: skip

    def kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl("-n", self.namespace, *arguments)

    def drop(self, pod: str) -> None:
        self.kubectl("delete", "pod", pod, "--grace-period=0", "--force")

    def submit(self, **spec: Any) -> None:
        apply(self.cluster, self.namespace, job(**{**LOAN, **spec}))

    async def look(self, times: int = 1) -> Document:
        """Reconcile; return the status as the API server has it."""
        for _ in range(times):
            await relist(self.parts.kube, FOLLOWED)
            key = Key("finetunejob", self.namespace, "support")
            await reconcile(key, kube=self.parts.kube, facts=self.parts.facts, now=NOW)
        found: Document = json.loads(self.kubectl("get", "ftj", "support", "-o", "json"))
        return dict(found.get("status", {}))


@pytest.fixture
async def scene(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Scene]:
    # The client library reads KUBECONFIG once, when it is imported.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))
    config = OperatorConfig(namespace=namespace, admin_token_file=tmp_path / "token")
    claim = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "models"},
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "",
                 "resources": {"requests": {"storage": "1Gi"}}},
    }  # fmt: skip
    async with await open_client() as client:
        made = Scene(cluster, namespace, assemble(config, HttpTransport(client)))
        apply(cluster, namespace, claim)
        yield made


def condition(status: Document, type_: str) -> tuple[str, str, str]:
    found = next(entry for entry in status["conditions"] if entry["type"] == type_)
    return found["status"], found["reason"], found["message"]


class RealReplica(TrainerClient):
    """The operator's own client, to a server whose claim is a folder of this machine."""

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(Path("/nowhere"), timeout_s=300, admin_port=port)
        self._folder = folder

    async def lend(self, pod_ip: str, job: Document) -> bool:
        moved = json.dumps(job).replace(CLAIM, str(self._folder))
        return await super().lend(pod_ip, json.loads(moved))

    async def lender(self, pod_ip: str) -> Lender | None:
        found = await super().lender(pod_ip)
        if found is None or found.loan is None:
            return found
        loan = found.loan
        document = {
            "inFlight": found.in_flight,
            "loan": {
                "job": loan.job, "generation": loan.generation, "directory": loan.directory,
                "progress": loan.progress, "exitCode": loan.exit_code, "endedAt": loan.ended_at,
                "reason": loan.reason, "message": loan.message,
            },
        }  # fmt: skip
        moved = json.dumps(document).replace(str(self._folder), CLAIM)
        return parse_lender(json.loads(moved))


async def test_a_replica_that_serves_trains_a_job_to_its_end(scene: Scene, tmp_path: Path) -> None:
    write_samples(tmp_path / "data.jsonl")
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as running:
        (tmp_path / "smollm2").symlink_to(running.service.config.model_path)
        client = RealReplica(tmp_path, running.server.ports.admin)
        scene.ask(client)
        scene.serve("127.0.0.1", **LENDS)
        scene.submit()
        status = await scene.look()
        assert status["lending"].get("replica") == "smollm2-0123-0-0", status
        assert condition(status, "Admitted")[0] == "False", "its replica is not seen at it yet"
        async with asyncio.timeout(WAIT_S):
            # As an operator does: a job that nobody asks about any more is given up.
            while status["phase"] not in ("Succeeded", "Failed"):
                await asyncio.sleep(0.1)  # the job gets what nobody else wants of the processor
                status = await scene.look()
        await client.close()
    assert status["phase"] == "Succeeded", status
    assert status["progress"]["steps"] == "8/8"
    assert status["checkpoint"]["step"] == 8
    assert "replica" not in status["lending"]
    uri = status["artifact"]["uri"]
    assert uri.startswith("pvc://models/adapters/support/")
    assert (tmp_path / uri.removeprefix("pvc://models/") / "adapter_model.safetensors").exists()
    assert condition(status, "EvaluationPassed")[0] == "True"
    pods = scene.kubectl("get", "pods", "-o", "name").split()
    assert pods == ["pod/smollm2-0123-0-0"], "the job has no pod of its own"


async def test_the_replica_with_the_fewest_requests_lends(scene: Scene) -> None:
    scene.serve("10.0.0.1", "10.0.0.2", "10.0.0.3", **LENDS)
    scene.replicas.in_flight = {"10.0.0.1": 3, "10.0.0.2": 0, "10.0.0.3": 1}
    scene.submit()
    await scene.look()
    status = await scene.look()
    assert scene.replicas.lent == [("10.0.0.2", 1)]
    assert (status["phase"], status["generation"]) == ("Running", 1)
    assert await scene.look(times=3) == status, "looking again changes nothing"


async def test_a_job_waits_while_all_replicas_lend_to_others(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.replicas.loans["10.0.0.1"] = Loan("team/other", 1, "/elsewhere", {"phase": "Running"})
    scene.submit()
    status = await scene.look()
    assert status["phase"] == "Pending"
    assert condition(status, "Admitted")[1] == "NoReplicaToLend"
    scene.replicas.end("10.0.0.1", 0)
    await scene.look()
    assert scene.replicas.lent == [("10.0.0.1", 1)]


async def test_a_job_goes_on_elsewhere_when_its_replica_is_gone(scene: Scene) -> None:
    scene.serve("10.0.0.1", "10.0.0.2", **LENDS)
    scene.submit()
    await scene.look(times=2)
    scene.drop("smollm2-0123-0-0")
    status = await scene.look()
    assert scene.replicas.lent == [("10.0.0.1", 1), ("10.0.0.2", 2)]
    assert status["lending"]["replica"] == "smollm2-0123-1-0"
    assert status["restarts"] == 0, "a lost replica is nobody's fault"


async def test_a_replica_whose_process_began_anew_is_asked_again(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.submit()
    await scene.look(times=2)
    scene.replicas.loans.clear()
    await scene.look()
    assert scene.replicas.lent == [("10.0.0.1", 1), ("10.0.0.1", 2)]


async def test_a_silent_replica_is_waited_for(scene: Scene) -> None:
    scene.serve("10.0.0.1", "10.0.0.2", **LENDS)
    scene.submit()
    await scene.look(times=2)
    scene.replicas.silent.add("10.0.0.1")
    status = await scene.look(times=3)
    assert scene.replicas.lent == [("10.0.0.1", 1)], "two at once would share checkpoints"
    assert (status["phase"], status["generation"]) == ("Running", 1)


async def test_what_an_operator_began_and_could_not_write_down_is_found(scene: Scene) -> None:
    scene.serve("10.0.0.1", "10.0.0.2", **LENDS)
    scene.submit()
    await scene.look()
    began = scene.replicas.loans["10.0.0.1"]
    scene.replicas.in_flight["10.0.0.1"] = 5
    scene.kubectl("patch", "ftj", "support", "--type=merge", "--subresource=status",
                  "-p", '{"status": null}')  # fmt: skip
    status = await scene.look()
    assert status["lending"]["replica"] == "smollm2-0123-0-0"
    assert scene.replicas.loans == {"10.0.0.1": began}


async def test_an_older_run_elsewhere_has_to_end_first(scene: Scene) -> None:
    scene.serve("10.0.0.1", "10.0.0.2", **LENDS)
    scene.submit()
    await scene.look()
    stale = scene.replicas.loans["10.0.0.1"]
    assert stale is not None
    scene.replicas.loans["10.0.0.1"] = replace(stale, generation=7)
    status = await scene.look()
    assert scene.replicas.taken_back == ["10.0.0.1"]
    assert condition(status, "Admitted")[1] == "NoReplicaToLend"
    scene.replicas.end("10.0.0.1", 75)
    await scene.look()
    assert scene.replicas.lent[1:] == [("10.0.0.1", 2)]


async def test_suspending_takes_the_weights_back_and_resuming_lends_them_again(
    scene: Scene,
) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.submit()
    await scene.look(times=2)
    scene.submit(suspend=True)
    status = await scene.look()
    assert status["phase"] == "Yielding"
    assert scene.replicas.taken_back == ["10.0.0.1"]
    scene.replicas.end("10.0.0.1", 75)
    assert (await scene.look())["phase"] == "Suspended"
    scene.submit(suspend=False)
    await scene.look()
    assert scene.replicas.lent == [("10.0.0.1", 1), ("10.0.0.1", 2)]


async def test_crashes_are_counted_and_end_at_the_limit(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.submit()
    await scene.look(times=2)
    scene.replicas.end("10.0.0.1", 1, message="ZeroDivisionError: by zero")
    status = await scene.look()
    assert (status["restarts"], status["generation"]) == (1, 2)
    await scene.look(times=3)
    scene.replicas.end("10.0.0.1", 1, message="ZeroDivisionError: by zero")
    status = await scene.look()
    assert status["phase"] == "Failed"
    assert condition(status, "Failed")[1:] == ("TrainerCrashed", "ZeroDivisionError: by zero")


async def test_bad_data_ends_a_loan_as_it_ends_a_trainer(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.submit()
    await scene.look(times=2)
    said = {"reason": "DatasetEmpty", "message": "dataset colours: nothing is left."}
    scene.replicas.end("10.0.0.1", 42, **said)
    status = await scene.look()
    assert status["phase"] == "Failed"
    assert condition(status, "Failed")[1:] == ("DatasetEmpty", "dataset colours: nothing is left.")


async def test_a_job_that_the_replicas_refuse_fails_with_their_words(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.replicas.refusal = "Nothing can learn beside weights that are kept in few bits."
    scene.submit()
    status = await scene.look()
    assert status["phase"] == "Failed"
    assert condition(status, "Failed")[1:] == ("LoanRefused", scene.replicas.refusal)


async def test_a_finished_loan_is_promoted_like_any_job(scene: Scene) -> None:
    scene.serve("10.0.0.1", **LENDS)
    scene.submit(promotion={"deployment": "smollm2"})
    await scene.look(times=2)
    scene.replicas.end("10.0.0.1", 0, progress=DONE)
    status = await scene.look()
    assert status["phase"] == "Promoting"
    assert status["promotion"]["servedAs"] == "smollm2:support"


OBSTACLES: dict[str, tuple[Document, Document, str]] = {
    "a deployment that does not lend": ({}, {}, "Set spec.engine.lendsWeights"),
    "results on another claim": (
        LENDS,
        {"output": {"uri": "pvc://results/support"}},
        "The job uses results, and the replicas of smollm2 write to the claim of the model alone "
        "(models).",
    ),
}


@pytest.mark.parametrize(("serves", "wants", "says"), OBSTACLES.values(), ids=OBSTACLES)
async def test_a_job_cannot_begin_with(
    scene: Scene, serves: Document, wants: Document, says: str
) -> None:
    scene.serve("10.0.0.1", **serves)
    scene.submit(**wants)
    status = await scene.look()
    assert status["phase"] == "Pending"
    assert condition(status, "Accepted")[1] == "LendsNoWeights"
    assert says in condition(status, "Accepted")[2]
    assert scene.replicas.lent == []
