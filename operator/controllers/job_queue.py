"""Asks the API server about Kueue: is the job's queue there, and what do its pods wait for?"""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.jobs import generation_name
from mizzen.operator.desired.queues import is_held
from mizzen.operator.desired.train_config import Job
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref, object_path
from mizzen.operator.planning.generations import Outcome
from mizzen.operator.planning.lending import Wait
from mizzen.operator.status.job_facts import Problem
from mizzen.operator.status.queues import kueue_missing, queue_missing, wait_in_queue
from mizzen.operator.status.trainer_pods import generation_of, newest_pods, outcome_of

_GROUP = "/apis/kueue.x-k8s.io"


async def missing_queue(job: Job, kube: Kube) -> Problem | None:
    """Return why nobody would ever admit the job's pods, None where somebody may."""
    if not (queue := job.spec.queue):
        return None
    if (version := await _version(kube)) is None:
        return kueue_missing(queue)
    if await _look(Ref(version, "LocalQueue", job.namespace, queue), kube) is None:
        return queue_missing(queue)
    return None


async def find_wait(job: Job, pods: list[Json], kube: Kube) -> Wait | None:
    """Return why Kueue holds the newest pods back, None where it does not."""
    if not (queue := job.spec.queue):
        return None
    newest = newest_pods(pods)
    if not any(is_held(pod) and outcome_of(pod) is Outcome.PENDING for pod in newest):
        return None
    workload = None
    if (version := await _version(kube)) is not None:
        name = generation_name(job.name, generation_of(newest[0]))
        workload = await _look(Ref(version, "Workload", job.namespace, name), kube)
    return wait_in_queue(queue, workload)


async def _version(kube: Kube) -> str | None:
    """Return the version that Kueue prefers to be asked in; which ones it has changes over time."""
    found = await kube.look_at(_GROUP)
    return str(found["preferredVersion"]["groupVersion"]) if found else None


async def _look(ref: Ref, kube: Kube) -> Json | None:
    return await kube.look_at(object_path(ref))
