"""Carries a plan out, in an order in which being interrupted anywhere loses nothing."""

from __future__ import annotations

from datetime import datetime

from mizzen.operator.controllers.llmdeployment_plan import Plan
from mizzen.operator.controllers.llmdeployment_replicas import Group, is_leaving
from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import labels_of, uid_of
from mizzen.operator.kube.errors import AlreadyExists, KubeError
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.status.conditions import rfc3339


async def apply(plan: Plan, kube: Kube, *, now: datetime) -> None:
    """Make the plan's writes.

    Raises:
        KubeError: one of them failed; those before it stay, and the next look goes on from there.
    """
    for child in plan.children:
        await kube.apply(child)
    refusal = await _create_groups(plan, kube)
    for replica in plan.drain:
        await _begin_drain(replica, kube, now)
    for replica in plan.close:
        await set_gate(replica, is_open=False, kube=kube, now=now)
    for replica in plan.remove:
        if refusal is not None and replica.standing is Standing.FAILED:
            continue  # until its successor is there, it alone tells how often it has failed
        for pod in replica.pods:
            if not is_leaving(pod):
                # Its status may have changed meanwhile, its identity may not.
                await kube.delete(pod, check_version=False)
    for child in plan.prune:
        await kube.delete(child)
    if refusal is not None:
        raise refusal


async def set_gate(group: Group, *, is_open: bool, kube: Kube, now: datetime) -> Json | None:
    """Say on the leader whether the replica takes traffic; return the pod as it is now."""
    if (leader := group.leader) is None:
        return None
    return await kube.apply_condition(
        leader,
        {
            "type": labels.IN_SERVICE_GATE,
            "status": str(is_open),
            "lastTransitionTime": rfc3339(now),
            "reason": "InService" if is_open else "Draining",
            "message": "The replica takes traffic." if is_open else "The replica is leaving.",
        },
    )


async def _create_groups(plan: Plan, kube: Kube) -> KubeError | None:
    """Create the new pods; return what stopped that, if anything.

    Under a quota that is used up, room comes only from the replicas that the plan takes away.
    """
    try:
        for group in plan.create:
            for pod in group:
                await _create(pod, kube)
    except KubeError as error:
        return error
    return None


async def _create(pod: Json, kube: Kube) -> None:
    """Create a pod; one that exists already must be the same one.

    Raises:
        AlreadyExists: somebody else's pod has the name.
    """
    live = await kube.create(pod)
    owners = {owner["uid"] for owner in live["metadata"].get("ownerReferences") or []}
    wanted = {owner["uid"] for owner in pod["metadata"]["ownerReferences"]}
    is_marked = labels_of(live).get(labels.DEPLOYMENT) == labels_of(pod)[labels.DEPLOYMENT]
    if uid_of(live) and not (owners & wanted and is_marked):
        raise AlreadyExists(
            "A pod that is not part of this deployment has the name of one of its replicas. "
            "Delete or rename it."
        )


async def _begin_drain(group: Group, kube: Kube, now: datetime) -> None:
    """Note the drain first: were the gate closed without the note, it would be opened again."""
    if (leader := group.leader) is None:
        return
    await kube.annotate(leader, {labels.DRAINING_SINCE: rfc3339(now)})
    await set_gate(group, is_open=False, kube=kube, now=now)
