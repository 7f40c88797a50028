"""What a watch event makes due: the right keys, soon enough, and nothing for an echo."""

import asyncio
from typing import Any

import pytest

from mizzen.operator.engine.key import Key
from mizzen.operator.engine.workqueue import WorkQueue
from mizzen.operator.handlers import Memo, note
from mizzen.operator.kube.store import Store
from mizzen.operator.routing import INDEXES, route
from mizzen.operator.specs import SpecCache

pytestmark = pytest.mark.looptime

Json = dict[str, Any]
DEPLOYMENT = Key("llmdeployment", "default", "smollm2")
JOB = Key("finetunejob", "default", "support")


def document(api_version: str, kind: str, name: str, version: int, **rest: Any) -> Json:
    metadata = {"name": name, "namespace": "default", "uid": name, "resourceVersion": str(version)}
    metadata |= rest.pop("metadata", {})
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **rest}


def deployment(version: int, **rest: Any) -> Json:
    spec = {"model": {"source": "file:///m"}}
    return document("mizzen.dev/v1alpha1", "LLMDeployment", "smollm2", version, spec=spec, **rest)


def job(version: int) -> Json:
    spec = {"baseModel": {"deployment": "smollm2"}, "promotion": {"deployment": "smollm2"}}
    return document("mizzen.dev/v1alpha1", "FineTuneJob", "support", version, spec=spec)


def pod(version: int, phase: str = "Pending") -> Json:
    labels = {"labels": {"mizzen.dev/deployment": "smollm2"}}
    return document("v1", "Pod", "p", version, metadata=labels, status={"phase": phase})


@pytest.fixture
def memo() -> Memo:
    return Memo(Store(route, indexes=INDEXES), WorkQueue(), SpecCache())


async def due(memo: Memo) -> list[Key]:
    """Return the keys that become due within a second, in order."""
    found = []
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            while True:
                found.append(await memo.queue.get())
    return found


async def test_a_changed_resource_is_due_at_once(memo: Memo) -> None:
    note("ADDED", deployment(1), memo)
    assert len(memo.queue) == 1


async def test_a_burst_of_a_groups_pods_is_one_look(memo: Memo) -> None:
    for version, phase in enumerate(("Pending", "Running", "Failed"), start=1):
        note("MODIFIED", pod(version, phase), memo)
        await asyncio.sleep(0.01)
    assert await due(memo) == [DEPLOYMENT]


async def test_the_echo_of_our_own_write_is_no_news(memo: Memo) -> None:
    memo.store.put(pod(5))
    note("MODIFIED", pod(5), memo)
    assert await due(memo) == []


async def test_a_deleted_child_is_news_for_its_owner(memo: Memo) -> None:
    memo.store.put(pod(5))
    note("DELETED", pod(6), memo)
    assert await due(memo) == [DEPLOYMENT]


async def test_a_job_is_news_for_the_deployment_it_promotes_to(memo: Memo) -> None:
    note("ADDED", job(1), memo)
    assert set(await due(memo)) == {JOB, DEPLOYMENT}


async def test_a_deployment_is_news_for_the_jobs_that_need_it(memo: Memo) -> None:
    memo.store.put(job(1))
    note("MODIFIED", deployment(2, status={"phase": "Ready"}), memo)
    assert set(await due(memo)) == {JOB, DEPLOYMENT}


async def test_a_deleted_resource_leaves_no_parsed_spec(memo: Memo) -> None:
    note("ADDED", deployment(1), memo)
    memo.specs.deployment(deployment(1))
    note("DELETED", deployment(2), memo)
    assert vars(memo.specs) == {"_specs": {}}


async def test_a_spec_is_parsed_once_per_generation(memo: Memo) -> None:
    first = memo.specs.deployment(deployment(1, metadata={"generation": 1}))
    assert memo.specs.deployment(deployment(2, metadata={"generation": 1})) is first
    assert memo.specs.deployment(deployment(3, metadata={"generation": 2})) is not first
