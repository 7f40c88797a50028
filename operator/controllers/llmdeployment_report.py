"""Writes a deployment's status where it changed, and tells people when a condition flips."""

from __future__ import annotations

import contextlib
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_adapters import AdaptersSeen
from mizzen.operator.controllers.llmdeployment_loading import LoadingSeen
from mizzen.operator.controllers.llmdeployment_observe import Observed, SpecRefusedError
from mizzen.operator.controllers.llmdeployment_replicas import Group
from mizzen.operator.controllers.llmdeployment_rollout import Course
from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    KubeError,
    QuotaExceeded,
)
from mizzen.operator.kube.events import Event
from mizzen.operator.namespaces import AdminTokenMissingError
from mizzen.operator.status.causes import Cause
from mizzen.operator.status.conditions import (
    Condition,
    ConditionType,
    Document,
    next_conditions,
    rfc3339,
)
from mizzen.operator.status.llmdeployment import (
    AdapterSeen,
    PodSeen,
    ReplicaSeen,
    Seen,
    news,
    next_status,
)
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.scaling import SCALING, scaling_seen

_FAILURES: tuple[tuple[type[KubeError], Reason], ...] = (
    (AdminTokenMissingError, Reason.ADMIN_TOKEN_MISSING),
    (QuotaExceeded, Reason.QUOTA_EXCEEDED),
    (Forbidden, Reason.POD_REFUSED),
    (Invalid, Reason.POD_REFUSED),
    (AlreadyExists, Reason.POD_REFUSED),
)


async def report(
    observed: Observed,
    seen: Seen,
    *,
    kube: Kube,
    now: datetime,
) -> None:
    """Write the status: things as they stand after this round's writes."""
    status = next_status(observed.status, seen, now=now)
    await _write(observed.resource, status, kube, now)


async def report_refusal(
    resource: Json, why: SpecRefusedError, kube: Kube, *, now: datetime
) -> None:
    """Say that the spec cannot be followed; whatever runs is left as it is."""
    previous = {k: v for k, v in (resource.get("status") or {}).items() if k != SCALING}
    generation = int(resource["metadata"]["generation"])
    conditions = [
        Condition(type_, status, why.reason, str(why))
        for type_, status in (
            (ConditionType.READY, False),
            (ConditionType.ACCEPTED, False),
            (ConditionType.STALLED, True),
        )
    ]
    before = previous.get("conditions") or []
    status: Document = {
        **previous,
        "observedGeneration": generation,
        "phase": "Failed",
        "conditions": next_conditions(before, conditions, observed_generation=generation, now=now),
    }
    await _write(resource, status, kube, now)


def what_is_seen(
    observed: Observed,
    course: Course,
    groups: list[Group],
    adapters: AdaptersSeen,
    loading: LoadingSeen,
    *,
    facts: Facts,
    plan: Document | None = None,
    failure: KubeError | None = None,
) -> Seen:
    """Return what the status is made of."""
    serving, spec, domain = observed.serving, observed.spec, facts.config.cluster_domain
    return Seen(
        generation=observed.generation,
        revision=course.target,
        rollout=course.rollout,
        promoted=_promoted(observed, course),
        note=course.note,
        plan=plan,
        desired=observed.desired,
        max_unavailable=spec.rollout.max_unavailable,
        scaling=scaling_seen(observed.status) if spec.scaling else None,
        is_holding=observed.is_holding,
        url=f"http://{serving.name}.{serving.namespace}.svc.{domain}:{labels.HTTP_PORT}/v1",
        selector=f"{labels.DEPLOYMENT}={serving.name},{labels.RANK}=0",
        devices_per_pod=spec.devices_per_pod,
        replicas=tuple(_replica(group, observed, adapters, loading) for group in groups),
        adapters=tuple(
            AdapterSeen(
                wanted.name,
                wanted.digest,
                wanted.job,
                adapters.errors.get(wanted.name, ""),
                wanted.on_trial,
            )
            for wanted in serving.adapters
        ),
        has_leftover_adapters=bool(adapters.incomplete or adapters.leftover),
        failure=_failure(failure),
    )


def _replica(
    group: Group, observed: Observed, adapters: AdaptersSeen, loading: LoadingSeen
) -> ReplicaSeen:
    cause = group.cause
    if cause and cause.reason is Reason.UNSCHEDULABLE:
        cause = observed.too_large or cause
    looks = [loading.by_pod.get(pod["metadata"]["name"]) for pod in group.pods]
    if any(look and look.is_moving for look in looks):
        cause = None  # of an earlier attempt, which this one has passed
    return ReplicaSeen(
        revision=group.replica.revision,
        standing=group.standing,
        pods=tuple(
            PodSeen(pod["metadata"]["name"], str(pod.get("spec", {}).get("nodeName") or ""), look)
            for pod, look in zip(group.pods, looks, strict=True)
        ),
        cause=cause,
        adapters=adapters.loaded.get(group.address, ()),
    )


def _promoted(observed: Observed, course: Course) -> Document:
    """Return whose model is wanted, and the revision that brings it."""
    if (promoted := observed.serving.promoted) is None:
        return {}
    revision, rollout = observed.revision, course.rollout
    past = course.servings.get(rollout.stable) if rollout else None
    if rollout and past and past.spec.model.source == promoted.uri:
        # It is served already: should the rollout fail, the model is not what was wrong.
        revision = rollout.stable
    return {"job": promoted.job, "digest": promoted.digest, "revision": revision}


def _failure(error: KubeError | None) -> Cause | None:
    """Return the cause for people where a write cannot succeed as things are."""
    for kind, reason in _FAILURES:
        if isinstance(error, kind):
            return Cause(reason, str(error), needs_change=not isinstance(error, Conflict))
    return None


async def _write(resource: Json, status: Document, kube: Kube, now: datetime) -> None:
    previous = {k: v for k, v in (resource.get("status") or {}).items() if k != SCALING}
    if previous == status:
        return
    await kube.apply_status(resource, status, apart=SCALING)
    for flip in news(previous, status):
        event = Event(
            about=resource,
            reason=flip.reason,
            message=flip.message,
            is_warning=flip.is_warning,
            at=rfc3339(now),
        )
        with contextlib.suppress(KubeError):  # the status has it; an Event only points there
            await kube.create_event(event)
