"""What a job asks of the arbiter, and what its pods and status say about devices given back. Pure.

Since when a job is to leave stands on its pods and how often it had to in its status, so a
restarted operator goes on where the last one was.
"""

from __future__ import annotations

from datetime import datetime

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.desired.train_config import Job
from mizzen.operator.ledger import Request
from mizzen.operator.planning.generations import Fence, Finish, GiveUp, Lend, Step
from mizzen.operator.planning.lending import QueuedJob
from mizzen.operator.planning.placement import Gang
from mizzen.operator.status.conditions import ConditionType, parse_rfc3339
from mizzen.operator.status.job_facts import Lending
from mizzen.operator.status.trainer_pods import (
    leader_of,
    newest_pods,
    size_of,
    stopped_at,
    termination_of,
)


def request_of(resource: Json, job: Job, *, made: list[Json]) -> Request | None:
    """Return what the job asks for; None where it needs no devices or Kueue gives them.

    `made` are pods of the generation that an operator made before it died: they have their places.
    """
    spec, accelerator = job.spec, job.spec.resources.accelerator
    if not accelerator.is_gpu or spec.queue:
        return None
    if made:
        missing = size_of(made[0]) - len(made)
        return _request(resource, job, pods=missing, least_pods=missing)
    return _request(resource, job, pods=spec.workers.max, least_pods=spec.workers.min)


def request_for_more(resource: Json, job: Job, *, workers: int) -> Request | None:
    """Return what a job that runs with so many workers could use beside them, if it could."""
    spec = job.spec
    if not spec.resources.accelerator.is_gpu or spec.queue or workers >= spec.workers.max:
        return None
    lacks, step = spec.workers.max - workers, spec.parallelism.tensor
    return _request(resource, job, pods=lacks, least_pods=step, is_running=True)


def _request(
    resource: Json, job: Job, *, pods: int, least_pods: int, is_running: bool = False
) -> Request:
    spec, accelerator = job.spec, job.spec.resources.accelerator
    lending = (resource.get("status") or {}).get("lending") or {}
    patch = spec.pod_template_patch.to_api() if spec.pod_template_patch else {}
    return Request(
        resource=accelerator.resource,
        job=QueuedJob(
            job=f"{job.namespace}/{job.name}",
            namespace=job.namespace,
            gang=Gang(pods=pods, devices=accelerator.count or 1),
            least_pods=least_pods if least_pods < pods or is_running else None,
            pods_step=spec.parallelism.tensor,
            is_running=is_running,
            since=_waits_since(resource),
            is_spare=spec.spare_capacity.enabled,
            priority=spec.priority,
            preemptions=preemptions_of(resource),
            yield_within_s=spec.spare_capacity.yield_within_seconds,
            slowest_yield_s=lending.get("slowestYieldSeconds"),
        ),
        node_selector=patch.get("nodeSelector") or {},
        tolerations=tuple(patch.get("tolerations") or ()),
    )


def preemptions_of(resource: Json) -> int:
    """Return how often the job had to leave so far."""
    return int(((resource.get("status") or {}).get("lending") or {}).get("preemptions") or 0)


def reclaimed_at(pod: Json | None) -> datetime | None:
    """Return since when the pod is to leave, by us or by Kueue; None where it may stay."""
    noted = ((pod or {}).get("metadata", {}).get("annotations") or {}).get(labels.RECLAIMED_AT)
    noted = noted or stopped_at(pod or {})
    return parse_rfc3339(noted) if noted else None


def lending_of(
    resource: Json, job: Job | None, pods: list[Json], step: Step | None, *, now: datetime
) -> Lending | None:
    """Return what there is to say about the job's devices; None where that is nothing new."""
    if job is not None and job.spec.mode == "Loan":
        return _loan_of(resource, pods, step)
    pod = leader_of(pods)
    if job is None or pod is None:
        return None
    if not job.spec.queue and not job.spec.resources.accelerator.is_gpu:
        return None
    notes = pod["metadata"].get("annotations") or {}
    since = reclaimed_at(pod)
    ended = termination_of(pod).get("finishedAt")
    yield_s = None
    if since is not None and isinstance(step, Fence):
        yield_s = (now - since).total_seconds()
    elif since is not None and ended:
        yield_s = max(0.0, (parse_rfc3339(ended) - since).total_seconds())
    return Lending(
        nodes=_nodes_of(newest_pods(pods)),
        preemptions=int(notes.get(labels.PREEMPTIONS, 0)) + (since is not None),
        is_reclaimed=since is not None,
        yield_s=yield_s,
    )


def _loan_of(resource: Json, pods: list[Json], step: Step | None) -> Lending:
    """Return which replica has the job; none once it has left."""
    left = preemptions_of(resource)
    if isinstance(step, Lend):
        return Lending(replica=step.replica, crashes=step.crashes, preemptions=left)
    pod = leader_of(pods)
    if pod is None or isinstance(step, Finish | GiveUp):
        return Lending(preemptions=left)
    return Lending(
        replica=pod["metadata"]["name"],
        crashes=int(pod["metadata"]["annotations"][labels.RESTARTS]),
        preemptions=left,
    )


def _nodes_of(pods: list[Json]) -> tuple[str, ...]:
    """Return the nodes of the pods that have not ended, each once, the leader's first."""
    at_work = (pod for pod in pods if not termination_of(pod))
    nodes = ((pod.get("spec") or {}).get("nodeName") for pod in at_work)
    return tuple(dict.fromkeys(node for node in nodes if node))


def _waits_since(resource: Json) -> datetime:
    """Return since when the job has no devices; one that never had any waits since it was made."""
    for condition in (resource.get("status") or {}).get("conditions") or []:
        if condition["type"] == ConditionType.ADMITTED and condition["status"] == "False":
            return parse_rfc3339(condition["lastTransitionTime"])
    return parse_rfc3339(resource["metadata"]["creationTimestamp"])
