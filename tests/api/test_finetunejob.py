"""A job's life on a real API server: its pods' ends are played by hand, everything else is real."""

import json
from collections.abc import Callable
from datetime import timedelta

import pytest

from mizzen.operator.status.progress import parse_progress
from tests.fixtures.job_scene import DATA, NOW, Document, Scene, condition, job

pytestmark = pytest.mark.api

DONE = {
    "phase": "Succeeded", "step": 40, "totalSteps": 40, "loss": 1.5, "generation": 1,
    "evaluation": [{"suite": "holdout", "base": 10.0, "candidate": 8.0,
                    "regressionRatio": -0.2, "passed": True}],
    "artifact": {"kind": "adapter", "path": "/mnt/pvc/models/adapters/support/0123",
                 "digest": "sha256:0123", "bytes": 99},
}  # fmt: skip
REGRESSED = DONE | {
    "artifact": None,
    "evaluation": [{"suite": "holdout", "base": 10.0, "candidate": 12.0,
                    "regressionRatio": 0.2, "passed": False}],
}  # fmt: skip


async def test_a_job_trains_and_succeeds(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    assert scene.pods() == ["support-g1-0"]
    scene.play("support-g1-0", "Running")
    scene.trainers.reported = parse_progress({"phase": "Running", "step": 12, "totalSteps": 40})
    status = await scene.look()
    assert (status["phase"], status["progress"]["steps"]) == ("Running", "12/40")
    scene.play("support-g1-0", "Succeeded", exitCode=0, message=json.dumps(DONE))
    status = await scene.look()
    assert status["phase"] == "Succeeded"
    assert status["artifact"]["uri"] == "pvc://models/adapters/support/0123"
    assert condition(status, "EvaluationPassed")["status"] == "True"


async def test_looking_again_writes_nothing(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    scene.play("support-g1-0", "Succeeded", exitCode=0, message=json.dumps(DONE))
    await scene.look()
    # Every namespace has one, which its controller may write at any time until then.
    scene.kubectl("wait", "--for=create", "configmap/kube-root-ca.crt", "--timeout=300s")
    before = scene.kubectl("get", "ftj,pods,cm", "-o", "jsonpath={.items[*].metadata}")
    scene.now += timedelta(hours=1)
    await scene.look(times=10)
    assert scene.kubectl("get", "ftj,pods,cm", "-o", "jsonpath={.items[*].metadata}") == before


async def test_a_finished_job_does_not_train_again_when_its_pod_is_cleaned_up(
    scene: Scene,
) -> None:
    scene.apply(job())
    await scene.look()
    scene.play("support-g1-0", "Succeeded", exitCode=0, message=json.dumps(DONE))
    before = await scene.look()
    scene.kubectl("delete", "pod", "support-g1-0", "--grace-period=0", "--force")
    assert await scene.look(times=3) == before
    assert scene.pods() == []


async def test_a_regression_fails_the_job(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    scene.play("support-g1-0", "Succeeded", exitCode=0, message=json.dumps(REGRESSED))
    status = await scene.look()
    assert status["phase"] == "Failed"
    assert condition(status, "Ready")["reason"] == "EvaluationFailed"
    assert "holdout" in condition(status, "Ready")["message"]


async def test_crashes_back_off_and_end_at_the_limit(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    ended = (NOW - timedelta(hours=1)).isoformat().replace("+00:00", "Z")
    scene.play("support-g1-0", "Failed", exitCode=137, finishedAt=ended)
    status = await scene.look()
    assert scene.pods() == ["support-g1-0", "support-g2-0"]
    assert status["restarts"] == 1
    scene.play("support-g2-0", "Failed", exitCode=137, finishedAt=ended)
    status = await scene.look()
    assert status["phase"] == "Failed"
    assert scene.pods() == ["support-g1-0", "support-g2-0"]


async def test_a_deleted_pod_is_replaced_and_costs_no_crash(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    scene.kubectl("delete", "pod", "support-g1-0", "--grace-period=0", "--force")
    status = await scene.look(times=2)
    assert scene.pods() == ["support-g2-0"]
    assert status["restarts"] == 0


async def test_suspending_yields_and_resuming_goes_on(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    scene.play("support-g1-0", "Running")
    scene.apply(job(suspend=True))
    assert (await scene.look())["phase"] == "Yielding"
    assert scene.trainers.asked_to_yield
    scene.trainers.hear = False
    await scene.look()
    assert scene.pods() == ["support-g1-0"], "it heard, and is about to leave its last words"
    last_words = {"phase": "Running", "checkpoint": {"step": 7, "committedAt": "now"}}
    scene.play("support-g1-0", "Failed", exitCode=75, message=json.dumps(last_words))
    status = await scene.look()
    assert status["phase"] == "Suspended"
    assert status["checkpoint"]["step"] == 7
    scene.apply(job(suspend=False))
    await scene.look()
    assert scene.pods() == ["support-g1-0", "support-g2-0"]


FETCHING: Document = {
    "apiVersion": "mizzen.dev/v1alpha1",
    "kind": "LLMDeployment",
    "metadata": {"name": "fetching"},
    "spec": {"model": {"source": "hf://org/base"}},
}
SPREAD: Document = {
    "apiVersion": "mizzen.dev/v1alpha1",
    "kind": "LLMDeployment",
    "metadata": {"name": "spread"},
    "spec": {"model": {"source": "pvc://models/smollm2"}, "parallelism": {"tensor": 2, "nodes": 2}},
}


def drawn_by(deployment: str) -> Document:
    rewards = [{"type": "exactAnswer"}]
    return {
        "method": "grpo",
        "rl": {"rewards": rewards, "rollout": {"deployment": deployment}},
        "evaluation": {"suites": [{"name": "holdout", "type": "reward"}]},
    }


BAD_INPUT: dict[str, tuple[Callable[[Scene], None], Document, str, str]] = {
    "a dataset that is missing": (
        lambda scene: scene.kubectl("delete", "configmap", "tickets"),
        {}, "DatasetNotFound", "ConfigMap tickets",
    ),
    "a key the ConfigMap has not": (
        lambda scene: None,
        {"dataset": [{"name": "t", "uri": "configMap://tickets/other"}]},
        "DatasetNotFound", "data.jsonl",
    ),
    "a claim that is missing": (
        lambda scene: None, {"output": {"uri": "pvc://nowhere/x"}}, "ClaimNotFound", "nowhere",
    ),
    "a base deployment whose model is fetched": (
        lambda scene: scene.apply(FETCHING),
        {"baseModel": {"deployment": "fetching"}}, "BaseModelNotFound", "Copy the model",
    ),
    "a base deployment that is missing": (
        lambda scene: None, {"baseModel": {"deployment": "ghost"}}, "BaseModelNotFound", "ghost",
    ),
    "a deployment for rollouts that is missing": (
        lambda scene: None, drawn_by("ghost"), "RolloutNotFound", "ghost",
    ),
    "a deployment for rollouts whose replicas have several pods": (
        lambda scene: scene.apply(SPREAD), drawn_by("spread"), "RolloutRefused", "parallelism",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("prepare", "spec", "reason", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
async def test_missing_input_is_named_and_waited_for(
    scene: Scene, prepare: Callable[[Scene], None], spec: Document, reason: str, words: str
) -> None:
    prepare(scene)
    scene.apply(job(**spec))
    status = await scene.look()
    assert scene.pods() == []
    assert condition(status, "Accepted")["reason"] == reason
    assert words in condition(status, "Ready")["message"]


async def test_a_job_is_told_where_the_replicas_are_that_draw_for_it(scene: Scene) -> None:
    spec = {"model": SPREAD["spec"]["model"], "parallelism": {"tensor": 2}}
    chat = SPREAD | {"metadata": {"name": "chat"}, "spec": spec}
    scene.apply(chat)
    scene.apply(job(**drawn_by("chat")))
    await scene.look()
    assert scene.pods() == ["support-g1-0"]
    found = json.loads(scene.kubectl("get", "configmap", "support-g1", "-o", "json"))
    told = json.loads(found["data"]["job.json"])
    assert told["rl"]["rollout"] == {"url": f"http://chat.{scene.namespace}.svc:8000"}


async def test_a_job_whose_data_arrives_starts(scene: Scene) -> None:
    scene.kubectl("delete", "configmap", "tickets")
    scene.apply(job())
    await scene.look()
    scene.apply(DATA)
    status = await scene.look()
    assert scene.pods() == ["support-g1-0"]
    assert condition(status, "Accepted")["status"] == "True"


async def test_a_trainer_that_refuses_its_data_ends_the_job_with_its_words(scene: Scene) -> None:
    scene.apply(job())
    await scene.look()
    words = {"reason": "DatasetNotJson", "message": "dataset tickets: line 7 is not JSON."}
    scene.play("support-g1-0", "Failed", exitCode=42, message=json.dumps(words))
    status = await scene.look()
    assert status["phase"] == "Failed"
    ready = condition(status, "Ready")
    assert (ready["reason"], ready["message"]) == ("DatasetNotJson", words["message"])
    assert scene.pods() == ["support-g1-0"]


async def test_workers_come_together_and_go_together(scene: Scene) -> None:
    scene.apply(job(workers={"min": 1, "max": 2}))
    status = await scene.look(times=2)
    assert scene.pods() == ["support-g1-0", "support-g1-1"]
    assert status["workers"] == 2
    scene.play("support-g1-0", "Running")
    scene.play("support-g1-1", "Running")
    scene.kubectl("delete", "pod", "support-g1-1", "--grace-period=0", "--force")
    scene.play("support-g1-0", "Failed", exitCode=76)
    status = await scene.look(times=2)
    assert scene.pods() == ["support-g1-0", "support-g2-0", "support-g2-1"]
    assert status["restarts"] == 0


async def test_another_number_of_workers_for_one_copy_takes_a_yield(scene: Scene) -> None:
    scene.apply(job(workers={"min": 2, "max": 2}))
    await scene.look()
    scene.play("support-g1-0", "Running")
    scene.play("support-g1-1", "Running")
    scene.apply(job(workers={"min": 2, "max": 2}, parallelism={"tensor": 2}))
    assert (await scene.look())["phase"] == "Yielding"
    scene.play("support-g1-0", "Failed", exitCode=75)
    scene.play("support-g1-1", "Failed", exitCode=75)
    assert (await scene.look(times=2))["workers"] == 2
    assert "support-g2-1" in scene.pods()


async def test_another_number_of_workers_takes_a_yield(scene: Scene) -> None:
    scene.apply(job(workers={"max": 2}))
    await scene.look()
    scene.play("support-g1-0", "Running")
    scene.play("support-g1-1", "Running")
    scene.apply(job(workers={"max": 1}))
    assert (await scene.look())["phase"] == "Yielding"
    assert scene.trainers.asked_to_yield
    scene.play("support-g1-0", "Failed", exitCode=75)
    scene.play("support-g1-1", "Failed", exitCode=75)
    status = await scene.look(times=2)
    assert "support-g2-0" in scene.pods()
    assert "support-g2-1" not in scene.pods()
    assert status["workers"] == 1
