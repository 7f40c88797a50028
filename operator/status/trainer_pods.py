"""What a job's pods say about its newest generation. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.labels import (
    GENERATION,
    GROUP_SIZE,
    KUEUE_STOPPED,
    RANK,
    RESTARTS,
    TENSOR,
)
from mizzen.operator.planning.generations import (
    BAD_CONFIGURATION_EXIT_CODE,
    WORKER_LOST_EXIT_CODE,
    YIELDED_EXIT_CODE,
    Generation,
    Outcome,
    outcome_of_group,
)
from mizzen.operator.status.conditions import parse_rfc3339
from mizzen.operator.status.progress import Progress, parse_progress


def generation_of(pod: Json) -> int:
    """Return the number of the generation a pod belongs to."""
    return int(pod["metadata"]["labels"][GENERATION])


def newest_pods(pods: Iterable[Json]) -> list[Json]:
    """Return the pods of the newest generation, by rank."""
    by_rank = sorted(pods, key=rank_of)
    return pods_of(by_rank, max(map(generation_of, by_rank), default=0))


def pods_of(pods: Iterable[Json], number: int) -> list[Json]:
    """Return the pods of one generation."""
    return [pod for pod in pods if generation_of(pod) == number]


def size_of(pod: Json) -> int:
    """Return how many workers the pod's generation has."""
    return int(pod["metadata"].get("annotations", {}).get(GROUP_SIZE, 1))


def leader_of(pods: Iterable[Json]) -> Json | None:
    """Return the newest generation's leader, which speaks for all, if it is there."""
    return next((pod for pod in newest_pods(pods) if rank_of(pod) == 0), None)


def telling_pod(pods: Iterable[Json], outcome: Outcome) -> Json | None:
    """Return the pod whose own end explains the newest generation's."""
    return next((pod for pod in newest_pods(pods) if outcome_of(pod) is outcome), leader_of(pods))


def newest_generation(pods: list[Json], status: Mapping[str, object]) -> Generation | None:
    """Return the newest generation; one whose pods are gone is known from the job's status."""
    recorded = status.get("generation")
    known = recorded if isinstance(recorded, int) else 0
    newest = newest_pods(pods)
    if newest and (number := generation_of(newest[0])) >= known:
        if number > known and len(newest) < size_of(newest[0]):
            # Not all of them were made, or seen, before the job's status was to say so.
            return newest_generation([p for p in pods if generation_of(p) != number], status)
        return _generation(newest)
    if not known:
        return None
    crashes = status.get("restarts")
    return Generation(known, Outcome.LOST, crashes if isinstance(crashes, int) else 0)


def _generation(pods: list[Json]) -> Generation:
    by_rank = {rank_of(pod): pod for pod in pods}
    size = size_of(pods[0])
    outcomes = [outcome_of(by_rank[r]) if r in by_rank else Outcome.LOST for r in range(size)]
    times = (_time(termination_of(pod).get("finishedAt")) for pod in pods)
    return Generation(
        number=generation_of(pods[0]),
        outcome=outcome_of_group(outcomes),
        crashes=int(pods[0]["metadata"].get("annotations", {}).get(RESTARTS, 0)),
        ended_at=max(filter(None, times), default=None),
        workers=size,
        placed=sum(bool(pod.get("spec", {}).get("nodeName")) for pod in pods),
        created_at=_time(pods[0]["metadata"].get("creationTimestamp")),
        tensor=int(pods[0]["metadata"].get("annotations", {}).get(TENSOR, 1)),
    )


def rank_of(pod: Json) -> int:
    """Return the pod's place in its generation; 0 leads."""
    return int(pod["metadata"]["labels"].get(RANK, 0))


def termination_of(pod: Json) -> Json:
    """Return how the trainer's container ended, empty while it has not."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        if terminated := container.get("state", {}).get("terminated"):
            return dict(terminated)
    return {}


def last_progress(pod: Json) -> Progress | None:
    """Return the progress document in the trainer's last words, if that is what they are."""
    try:
        return parse_progress(json.loads(str(termination_of(pod).get("message") or "")))
    except (ValueError, KeyError, AttributeError):
        return None


def outcome_of(pod: Json) -> Outcome:
    """Return where one pod stands."""
    status, terminated = pod.get("status", {}), termination_of(pod)
    phase = status.get("phase")
    if phase == "Succeeded":
        return Outcome.DONE
    if rank_of(pod) > 0 and phase != "Failed" and "deletionTimestamp" in pod["metadata"]:
        # On its way out, or on a node that nobody hears of: it writes nothing, so nobody waits.
        return Outcome.LOST
    if phase == "Running":
        return Outcome.RUNNING
    if phase != "Failed":
        return Outcome.PENDING
    match terminated.get("exitCode"):
        case code if code == YIELDED_EXIT_CODE:
            return Outcome.YIELDED
        case code if code == BAD_CONFIGURATION_EXIT_CODE:
            return Outcome.REJECTED
        case code if code == WORKER_LOST_EXIT_CODE:
            return Outcome.LEFT
        case None:
            return Outcome.LOST  # never ran: evicted, or its node refused it
    is_disrupted = any(
        condition["type"] == "DisruptionTarget" and condition["status"] == "True"
        for condition in status.get("conditions", [])
    )
    # The kubelet says so when it lost track, after a restart of the node.
    if is_disrupted or stopped_at(pod) or terminated.get("reason") == "ContainerStatusUnknown":
        return Outcome.LOST
    return Outcome.CRASHED


def stopped_at(pod: Json) -> str | None:
    """Return when Kueue took the pod's quota back, None where it did not."""
    return next(
        (
            str(condition["lastTransitionTime"])
            for condition in pod.get("status", {}).get("conditions", [])
            if condition["type"] == KUEUE_STOPPED and condition["status"] == "True"
        ),
        None,
    )


def _time(text: object) -> datetime | None:
    return parse_rfc3339(text) if isinstance(text, str) else None
