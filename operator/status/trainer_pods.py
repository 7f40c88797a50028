"""What a job's pods say about its newest generation. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.labels import GENERATION, RESTARTS
from mizzen.operator.planning.generations import (
    BAD_CONFIGURATION_EXIT_CODE,
    YIELDED_EXIT_CODE,
    Generation,
    Outcome,
)
from mizzen.operator.status.conditions import parse_rfc3339
from mizzen.operator.status.progress import Progress, parse_progress


def generation_of(pod: Json) -> int:
    """Return the number of the generation a pod belongs to."""
    return int(pod["metadata"]["labels"][GENERATION])


def newest_pod(pods: Iterable[Json]) -> Json | None:
    """Return the pod of the newest generation."""
    return max(pods, key=generation_of, default=None)


def newest_generation(pods: Iterable[Json], status: Mapping[str, object]) -> Generation | None:
    """Return the newest generation; one whose pods are gone is known from the job's status."""
    recorded = status.get("generation")
    known = recorded if isinstance(recorded, int) else 0
    pod = newest_pod(pods)
    if pod is not None and generation_of(pod) >= known:
        terminated = termination_of(pod)
        return Generation(
            number=generation_of(pod),
            outcome=_outcome(pod, terminated),
            crashes=int(pod["metadata"].get("annotations", {}).get(RESTARTS, 0)),
            ended_at=_time(terminated.get("finishedAt")),
        )
    if not known:
        return None
    crashes = status.get("restarts")
    return Generation(known, Outcome.LOST, crashes if isinstance(crashes, int) else 0)


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


def _outcome(pod: Json, terminated: Json) -> Outcome:
    status = pod.get("status", {})
    phase = status.get("phase")
    if phase == "Succeeded":
        return Outcome.DONE
    if phase == "Running":
        return Outcome.RUNNING
    if phase != "Failed":
        return Outcome.PENDING
    match terminated.get("exitCode"):
        case code if code == YIELDED_EXIT_CODE:
            return Outcome.YIELDED
        case code if code == BAD_CONFIGURATION_EXIT_CODE:
            return Outcome.REJECTED
        case None:
            return Outcome.LOST  # never ran: evicted, or its node refused it
    is_disrupted = any(
        condition["type"] == "DisruptionTarget" and condition["status"] == "True"
        for condition in status.get("conditions", [])
    )
    # The kubelet says so when it lost track, after a restart of the node.
    if is_disrupted or terminated.get("reason") == "ContainerStatusUnknown":
        return Outcome.LOST
    return Outcome.CRASHED


def _time(text: object) -> datetime | None:
    return parse_rfc3339(text) if isinstance(text, str) else None
