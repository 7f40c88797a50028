"""Results of jobs on a deployment: who holds a name, who must wait, and what is taken back."""

from __future__ import annotations

import asyncio
import copy
from datetime import UTC, datetime
from typing import Any

import pytest

from mizzen.operator.controllers import finetunejob
from mizzen.operator.controllers.job_inputs import find_base_model
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.engine.key import Key
from mizzen.operator.planning.promotions import MODEL, choose_holders, promoted_at
from mizzen.operator.status.job_facts import Approval, Problem, Promotion
from mizzen.operator.status.progress import Progress, parse_progress
from mizzen.operator.status.promotion import find_promotion
from mizzen.operator.status.reasons import Reason
from tests.fixtures.serving_world import World, publish_job
from tests.unit.test_llmdeployment_canary import STEPS, answers
from tests.unit.test_llmdeployment_rollout import go_on

Json = dict[str, Any]
NOW = datetime(2026, 1, 2, tzinfo=UTC)


def published(name: str, *, hour: int = 0, **promotion: str) -> Json:
    at = f"2026-01-01T{hour:02}:00:00Z"
    return {
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "spec": {"promotion": {"deployment": "smollm2", **promotion}},
        "status": {
            "conditions": [{"type": "Published", "status": "True", "lastTransitionTime": at}]
        },
    }


def rolled_back(job: Json) -> Json:
    failed = {"type": "Failed", "status": "True", "lastTransitionTime": "2026-01-01T09:00:00Z"}
    job["status"]["conditions"].append(failed)
    return job


def names(jobs: list[Json]) -> dict[str, str]:
    return {place: job["metadata"]["name"] for place, job in choose_holders(jobs).items()}


HOLDERS = {
    "each job holds its own name by default": (
        [published("a"), published("b")], {"a": "a", "b": "b"}),
    "whoever was published first holds a name": (
        [published("late", hour=2, adapter="x"), published("early", hour=1, adapter="x")],
        {"x": "early"}),
    "a name moves on to a job that says whom it replaces": (
        [published("a", hour=1, adapter="x"), published("b", hour=2, adapter="x", replaces="a")],
        {"x": "b"}),
    "and on again": (
        [published("a", hour=1, adapter="x"), published("b", hour=2, adapter="x", replaces="a"),
         published("c", hour=3, adapter="x", replaces="b")], {"x": "c"}),
    "but not twice from the same job": (
        [published("a", hour=1, adapter="x"), published("b", hour=2, adapter="x", replaces="a"),
         published("c", hour=3, adapter="x", replaces="a")], {"x": "b"}),
    "a whole model takes the deployment's own place": (
        [published("a", strategy="Canary"), published("b")], {MODEL: "a", "b": "b"}),
    "a job that needs approval holds nothing before": (
        [published("a", approval="Manual")], {}),
    "a job whose model was rolled back leaves its place to the one before": (
        [published("a", hour=1, strategy="Canary"),
         rolled_back(published("b", hour=2, strategy="Canary", replaces="a"))], {MODEL: "a"}),
}  # fmt: skip


@pytest.mark.parametrize(("jobs", "expected"), HOLDERS.values(), ids=HOLDERS)
def test_who_holds_a_place(jobs: list[Json], expected: dict[str, str]) -> None:
    assert names(jobs) == expected
    assert names(jobs[::-1]) == expected


def test_a_job_that_is_deleted_gives_its_name_back() -> None:
    first, second = published("a", hour=1, adapter="x"), published("b", hour=2, adapter="x")
    first["metadata"]["deletionTimestamp"] = "2026-01-01T05:00:00Z"
    assert names([first, second]) == {"x": "b"}


def test_a_result_waits_for_approval_and_for_the_operator_to_have_noted_it() -> None:
    job = published("a", approval="Manual")
    assert promoted_at(job) is None
    job["metadata"]["annotations"] = {"mizzen.dev/approve": "ada"}
    assert promoted_at(job) is None
    job["status"]["promotion"] = {"approvedAt": "2026-01-01T09:00:00Z"}
    assert promoted_at(job) == "2026-01-01T09:00:00Z"


# What the job's own status says

ARTIFACT = {"kind": "adapter", "path": "/mnt/pvc/m/a", "digest": "sha256:1", "bytes": 9}
DONE = parse_progress({"phase": "Succeeded", "artifact": ARTIFACT})
SERVING: Json = {
    "spec": {"model": {"source": "pvc://m/base"}},
    "status": {
        "readyReplicas": 2,
        "adapters": [{"name": "x", "digest": "sha256:1", "readyReplicas": 2}],
    },
}


def seen(
    job: Json, *others: Json, deployment: Json | None = SERVING, progress: Progress | None = DONE
) -> Promotion:
    found = find_promotion(job, progress, deployment, [job, *others], now=NOW)
    assert found is not None
    return found


def test_an_adapter_that_the_replicas_refuse_is_not_promoted_and_the_job_says_why() -> None:
    deployment = copy.deepcopy(SERVING)
    deployment["status"]["adapters"][0] |= {"readyReplicas": 0, "error": "Another base model."}
    found = seen(published("a", adapter="x"), deployment=deployment)
    assert found.problem == Problem(Reason.ADAPTER_REFUSED, "Another base model.")
    assert not found.is_done and not found.has_failed


def test_a_second_job_for_one_name_is_refused_and_told_whose_it_is() -> None:
    first, second = published("a", hour=1, adapter="x"), published("b", hour=2, adapter="x")
    assert seen(first, second).is_done
    problem = seen(second, first).problem
    assert problem is not None and problem.reason == "PromotionTaken"
    assert problem.message == (
        "smollm2:x is the result of job a. Say so in a job's promotion.replaces, choose another "
        "promotion.adapter, or delete job a."
    )


def test_a_job_whose_result_is_only_now_published_is_not_told_that_its_name_is_taken() -> None:
    first = published("a", hour=1, adapter="x")
    second = published("b", hour=2, adapter="x", replaces="a")
    second["status"]["conditions"] = []
    assert seen(second, first).problem is None and not seen(second, first).is_done


def test_a_job_whose_name_moved_on_is_done_and_says_to_whom() -> None:
    first = published("a", hour=1, adapter="x")
    second = published("b", hour=2, adapter="x", replaces="a")
    assert seen(first, second).replaced_by == "b" and seen(first, second).is_done
    assert seen(second, first).is_done


def test_a_promotion_stays_done_while_its_deployment_sleeps_or_gets_more_replicas() -> None:
    asleep, growing = copy.deepcopy(SERVING), copy.deepcopy(SERVING)
    asleep["status"] = {}
    growing["status"]["readyReplicas"] = 3
    job = published("x")
    assert not seen(job, deployment=asleep).is_done
    assert not seen(job, deployment=growing).is_done
    job["status"]["conditions"].append({"type": "Promoted", "status": "True"})
    assert seen(job, deployment=asleep).is_done
    assert seen(job, deployment=growing).is_done
    assert not seen(job, deployment=None).is_done


def test_an_approval_is_kept_with_who_and_when() -> None:
    job = published("x", approval="Manual")
    problem = seen(job).problem
    assert problem is not None and "kubectl mizzen approve x" in problem.message
    job["metadata"]["annotations"] = {"mizzen.dev/approve": "ada"}
    first = seen(job).approval
    assert first == Approval("ada", "2026-01-02T00:00:00Z")
    job["status"]["promotion"] = seen(job).to_api()
    later = find_promotion(job, DONE, SERVING, [job], now=NOW.replace(day=9))
    assert later is not None and later.approval == first and later.is_done
    del job["metadata"]["annotations"]
    assert seen(job).approval is None and not seen(job).is_done


def model_served(**rollout: Any) -> Json:
    deployment = copy.deepcopy(SERVING)
    promoted = {"job": "big", "digest": "sha256:1", "revision": "new"}
    deployment["status"] |= {"promotedModel": promoted, "revision": "new"}
    if rollout:
        deployment["status"]["rollout"] = {"revision": "new"} | rollout
    return deployment


def test_a_model_is_promoted_when_its_rollout_is_over_and_failed_when_it_was_taken_back() -> None:
    job = published("big", strategy="Canary")
    assert seen(job, deployment=model_served()).is_done
    assert not seen(job, deployment=model_served(stable="old")).is_done
    assert not seen(job, deployment=SERVING).is_done
    later = model_served(revision="later", stable="new", failure={"message": "Too many errors."})
    assert seen(job, deployment=later).is_done
    back = seen(job, deployment=model_served(failure={"message": "Too many errors."}))
    assert back.has_failed and back.problem is not None
    assert back.problem.message.endswith("model before: Too many errors.")


# On a deployment


def adapters(world: World) -> list[tuple[str, str, str]]:
    return [(a["name"], a["digest"], a["job"]) for a in world.status["adapters"]]


async def test_a_name_moves_to_a_newer_version_and_back_when_its_job_is_deleted() -> None:
    world = World()
    publish_job(world, "one", digest="sha256:1", adapter="support")
    await world.settle()
    assert adapters(world) == [("support", "sha256:1", "one")]
    later = {"at": "2026-01-01T01:00:00Z", "adapter": "support"}
    publish_job(world, "two", digest="sha256:2", **later)
    await world.settle()
    assert adapters(world) == [("support", "sha256:1", "one")]
    publish_job(world, "two", digest="sha256:2", replaces="one", **later)
    await world.settle()
    assert adapters(world) == [("support", "sha256:2", "two")]
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:2"}]
    (path,) = [path for path in world.api.objects if path.endswith("/two")]
    leaving = copy.deepcopy(world.api.objects[path])
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T02:00:00Z"
    world.api.put(path, leaving)
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:1"}]


PROBES = [
    {"prompt": "The capital of France is", "expect": "Paris"},
    {"prompt": "Two and two are", "expect": "4|four|Paris"},
]


async def reconcile_job(world: World, name: str) -> Json:
    key = Key("finetunejob", "team", name)
    await finetunejob.reconcile(key, kube=world.kube, facts=world.facts, now=world.now)
    (path,) = [path for path in world.api.objects if path.endswith(f"/finetunejobs/{name}")]
    status: Json = world.api.objects[path]["status"]
    return status


def promoted(status: Json) -> tuple[str, str, str]:
    (condition,) = [c for c in status["conditions"] if c["type"] == "Promoted"]
    return status["phase"], condition["status"], condition["reason"]


async def served_with_probes() -> World:
    """A name that moved on to a second job, which has probes."""
    world = World()
    publish_job(world, "one", digest="sha256:1", adapter="support")
    await world.settle()
    publish_job(
        world, "two", digest="sha256:2", at="2026-01-01T01:00:00Z",
        adapter="support", replaces="one", probes=PROBES,
    )  # fmt: skip
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:2"}]
    return world


async def test_an_adapter_that_talks_no_sense_is_taken_back_and_the_one_before_serves() -> None:
    world = await served_with_probes()
    world.runtimes.answer = " a large cheese"
    failed = await reconcile_job(world, "two")
    assert promoted(failed) == ("Failed", "False", "RolledBack")
    (why,) = [c["message"] for c in failed["conditions"] if c["type"] == "Failed"]
    assert "probe 1 does not match 'Paris': ' a large cheese'" in why
    assert why.endswith("and submit a new job.")
    await world.settle()
    assert list(world.runtimes.loaded.values()) == [{"support": "sha256:1"}]
    assert promoted(await reconcile_job(world, "one")) == ("Succeeded", "True", "Promoted")
    world.runtimes.answer = " Paris"
    assert await reconcile_job(world, "two") == failed, "there is no second chance"


async def test_an_adapter_waits_for_its_probes_and_is_asked_no_more_once_it_is_promoted() -> None:
    world = await served_with_probes()
    (address,) = world.runtimes.loaded
    world.runtimes.silent.add(address)
    assert promoted(await reconcile_job(world, "two")) == ("Promoting", "False", "Promoting")
    world.runtimes.silent.clear()
    world.runtimes.answer, world.runtimes.prompted = " Paris", []
    assert promoted(await reconcile_job(world, "two")) == ("Succeeded", "True", "Promoted")
    asked = [(address, "support", probe["prompt"]) for probe in PROBES]
    assert world.runtimes.prompted == asked
    world.runtimes.answer = " something else"
    assert promoted(await reconcile_job(world, "two")) == ("Succeeded", "True", "Promoted")
    assert world.runtimes.prompted == asked


async def test_all_probes_are_asked_at_once_and_one_bad_answer_needs_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = await served_with_probes()
    asked = asyncio.Barrier(len(PROBES))

    async def complete(pod_ip: str, model: str, prompt: str, *, max_tokens: int) -> str | None:
        # Answers that wait for the last question would never come one after another.
        await asyncio.wait_for(asked.wait(), 60)
        return None if prompt == PROBES[0]["prompt"] else " a large cheese"

    monkeypatch.setattr(world.runtimes, "complete", complete)
    failed = await reconcile_job(world, "two")
    (why,) = [c["message"] for c in failed["conditions"] if c["type"] == "Failed"]
    assert "probe 2 does not match" in why


async def test_a_model_that_fails_as_a_canary_is_taken_back_by_itself() -> None:
    canary = {"steps": STEPS, "rollbackOn": {"errorRatio": 0.01}}
    world = World(replicas=2, rollout={"canary": canary})
    await world.settle()
    stable = world.status["revision"]
    publish_job(
        world, "big", digest="sha256:9", uri="pvc://models/big", kind="model", strategy="Canary"
    )
    await go_on(world, 10)
    promoted = world.status["promotedModel"]
    assert (promoted["job"], promoted["digest"]) == ("big", "sha256:9")
    assert world.status["rollout"]["revision"] == promoted["revision"] != stable
    world.metrics.answers = {
        promoted["revision"]: answers(400, failures=200),
        stable: answers(400),
    }
    await go_on(world, 90)
    await world.settle()
    assert world.status["rollout"]["failure"]["reason"]
    assert world.status["revision"] == stable
    failed = await reconcile_job(world, "big")
    (condition,) = [c for c in failed["conditions"] if c["type"] == "Failed"]
    assert (failed["phase"], condition["reason"]) == ("Failed", "RolledBack")

    # A new revision for another reason is no second chance for it.
    world.change(engine={"image": "registry/runtime:2"})
    await go_on(world, 90)
    await world.settle()
    assert world.status["revision"] != stable
    assert "promotedModel" not in world.status
    assert all("/mnt/pvc/models/smollm2" in str(pod["spec"]) for pod in world.pods)
    assert await reconcile_job(world, "big") == failed

    # Its files are still there for whoever wants to try once more.
    world.metrics.answers = {}
    world.change(model={"source": failed["artifact"]["uri"]}, rollout={"canary": None})
    await go_on(world, 90)
    await world.settle()
    assert "rollout" not in world.status
    assert all("/mnt/pvc/models/big" in str(pod["spec"]) for pod in world.pods)


async def test_a_model_that_does_well_as_a_canary_is_what_the_deployment_serves() -> None:
    world = World(replicas=1)
    await world.settle()
    publish_job(
        world, "big", digest="sha256:9", uri="pvc://models/big", kind="model", strategy="Canary"
    )
    await go_on(world, 30)
    await world.settle()
    assert "rollout" not in world.status
    assert world.status["revision"] == world.status["promotedModel"]["revision"]
    (pod,) = world.pods
    assert "/mnt/pvc/models/big" in str(pod["spec"])


async def test_a_model_that_is_served_outlives_a_later_revision_that_is_rolled_back() -> None:
    world = World(replicas=2)
    await world.settle()
    publish_job(
        world, "big", digest="sha256:9", uri="pvc://models/big", kind="model", strategy="Canary"
    )
    await go_on(world, 30)
    await world.settle()
    assert "rollout" not in world.status
    served = world.status["revision"]
    canary = {"steps": STEPS, "rollbackOn": {"errorRatio": 0.01}}
    world.change(engine={"image": "registry/runtime:bad"}, rollout={"canary": canary})
    await go_on(world, 10)
    bad = world.status["rollout"]["revision"]
    world.metrics.answers = {bad: answers(400, failures=200), served: answers(400)}
    await go_on(world, 90)
    await world.settle()
    assert world.status["rollout"]["failure"]["reason"]
    assert world.status["promotedModel"]["revision"] == world.status["revision"] == served
    assert promoted(await reconcile_job(world, "big")) == ("Succeeded", "True", "Promoted")


async def test_a_job_starts_from_the_model_that_is_served_and_goes_on_with_what_it_began() -> None:
    world = World(replicas=1)
    await world.settle()
    spec = FineTuneJobSpec.model_validate(
        {"baseModel": {"deployment": "smollm2"}, "dataset": [{"name": "d", "uri": "pvc://d/d"}]}
    )

    def base(begun_with: str | None = None) -> object:
        return find_base_model(spec, "team", world.facts.store, begun_with=begun_with)

    assert base() == "pvc://models/smollm2"
    publish_job(
        world, "big", digest="sha256:9", uri="pvc://models/big", kind="model", strategy="Canary"
    )
    assert base() == "pvc://models/smollm2", "not before every replica answers with it"
    await go_on(world, 30)
    await world.settle()
    await reconcile_job(world, "big")
    assert base() == "pvc://models/big"
    assert base(begun_with="pvc://models/smollm2") == "pvc://models/smollm2"
