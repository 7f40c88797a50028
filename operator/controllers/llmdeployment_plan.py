"""What to do about a deployment now, from one look at it. Pure: no clock, no client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_adapters import AdaptersSeen
from mizzen.operator.controllers.llmdeployment_history import build_history
from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.llmdeployment_replicas import (
    Group,
    failure_note,
    left_to_place_s,
)
from mizzen.operator.controllers.llmdeployment_rollout import Course, plan_course, plan_step
from mizzen.operator.crds.common import Json
from mizzen.operator.desired.children import build_children
from mizzen.operator.desired.serving import PodPlace, Serving, build_pod
from mizzen.operator.planning.canary import CanaryLook
from mizzen.operator.planning.drain import Drain, is_drained
from mizzen.operator.planning.rollout import Creation, Replica, Standing, soonest

_POLL_DRAIN_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The writes of one reconcile, in the order in which they are made."""

    course: Course
    children: tuple[Json, ...]
    create: tuple[tuple[Json, ...], ...]  # groups of pods
    drain: tuple[Group, ...]
    close: tuple[Group, ...]  # draining or held back, but the gate still says in service
    remove: tuple[Group, ...]  # serve nobody, or have drained
    swap: Group | None  # gets new weights
    prune: tuple[Json, ...]
    look_again_after_s: float | None

    @property
    def takes_away(self) -> bool:
        """Whether it ends a replica that might be in use."""
        return bool(self.drain or self.remove)


def plan_deployment(observed: Observed, canary: CanaryLook | None = None, *, now: datetime) -> Plan:
    """Return what brings the deployment closer to its spec."""
    course = plan_course(observed, canary, now=now)
    step, swap = plan_step(observed, course, now=now)
    groups = {group.replica.place: group for group in observed.groups}
    draining = [g for g in observed.groups if g.standing is Standing.DRAINING]
    drained = [g for g in draining if _is_drained(g, observed, now)]
    serves = any(group.standing is Standing.IN_SERVICE for group in observed.groups)
    children = (
        # First: of a past revision's pods the last may go with this plan.
        *build_history(observed, in_use=course.servings),
        *build_children(
            observed.serving,
            has_served=serves or observed.has_service,
            has_groups=any(
                serving.spec.parallelism.nodes > 1
                for serving in (observed.serving, *course.servings.values())
            )
            or any(group.size > 1 for group in observed.groups),
            replicas=observed.desired,
        ),
    )
    return Plan(
        course=course,
        children=children,
        create=(*_incomplete(observed, course), *_new_groups(step.create, course, groups)),
        drain=tuple(groups[replica.place] for replica in step.drain),
        close=(*(g for g in draining if g.is_gate_open and g not in drained), *_held(observed)),
        remove=(*(groups[replica.place] for replica in step.remove), *drained),
        swap=groups[swap.place] if swap is not None else None,
        prune=_prune(observed.children, children),
        look_again_after_s=soonest(
            step.look_again_after_s,
            course.look_again_after_s,
            _POLL_DRAIN_S if draining or step.drain or swap is not None else None,
            *(left_to_place_s(group, now=now) for group in observed.groups),
        ),
    )


def gates_to_open(
    groups: Iterable[Group], observed: Observed, plan: Plan, adapters: AdaptersSeen
) -> list[Group]:
    """Return those of the replicas, as they stand after the plan's writes, that may take traffic.

    Without adapters nothing but the weights stands before the traffic, and those the replica's
    own readiness waits for: its gate opens at once, so it serves as soon as it has loaded, even
    while no operator runs. One adapter that no replica accepts must not keep the base model from
    its users, so only an adapter that could still be loaded holds the gate.
    """
    leaving = {group.replica.place for group in (*plan.drain, *plan.remove)}
    if observed.is_holding:
        return []
    return [
        group
        for group in groups
        if group.standing in (Standing.STARTING, Standing.UNREADY)
        and group.replica.revision in plan.course.servings
        and group.replica.place not in leaving
        and not group.is_gate_open
        and (not observed.serving.adapters or _has_adapters(group, adapters))
    ]


def groups_to_place(groups: Iterable[Group], plan: Plan) -> list[Group]:
    """Return those of the groups, as they stand after the plan's writes, that are complete.

    Until then the scheduler leaves their pods alone: half a group would hold devices for nothing.
    """
    leaving = {group.replica.place for group in plan.remove}
    return [
        group
        for group in groups
        if group.is_gated and not group.missing_ranks and group.replica.place not in leaving
    ]


def _held(observed: Observed) -> list[Group]:
    """Return the replicas to take out of service while it is checked whether anybody asks."""
    if not observed.is_holding:
        return []
    return [g for g in observed.groups if g.standing is Standing.IN_SERVICE and g.is_gate_open]


def _has_adapters(group: Group, adapters: AdaptersSeen) -> bool:
    return group.has_loaded and group.address not in adapters.incomplete


def _is_drained(group: Group, observed: Observed, now: datetime) -> bool:
    since = group.draining_since or now
    drain = Drain(since, group.is_running, observed.in_flight.get(group.address))
    return is_drained(drain, max_s=observed.spec.drain.max_seconds, now=now)


def _incomplete(observed: Observed, course: Course) -> list[tuple[Json, ...]]:
    """Return the pods that a new group still lacks, because the operator was interrupted."""
    return [
        _pods(course.servings[group.replica.revision], group.replica, "", ranks=group.missing_ranks)
        for group in observed.groups
        if group.missing_ranks
        and group.standing is Standing.STARTING
        and group.replica.revision in course.servings
    ]


def _new_groups(
    creations: Iterable[Creation], course: Course, groups: Mapping[tuple[str, int], Group]
) -> list[tuple[Json, ...]]:
    created: list[tuple[Json, ...]] = []
    for creation in creations:
        serving = course.servings.get(creation.revision)
        if serving is None:
            continue  # of a revision that nothing tells how to make again
        failed = groups.get(creation.replaces.place) if creation.replaces else None
        replica = Replica(
            creation.slot, creation.revision, Standing.STARTING, restarts=creation.restarts
        )
        note = failure_note(failed.cause if failed else None)
        ranks = range(serving.spec.parallelism.nodes)
        created.append(_pods(serving, replica, note, ranks=ranks))
    return created


def _pods(
    serving: Serving, replica: Replica, last_failure: str, *, ranks: Iterable[int]
) -> tuple[Json, ...]:
    return tuple(
        build_pod(
            serving,
            PodPlace(
                revision=replica.revision,
                slot=replica.slot,
                rank=rank,
                restarts=replica.restarts,
                last_failure=last_failure,
            ),
        )
        for rank in ranks
    )


def _prune(present: Iterable[Json], wanted: Iterable[Json]) -> tuple[Json, ...]:
    kept = {(child["kind"], child["metadata"]["name"]) for child in wanted}
    return tuple(
        child for child in present if (child["kind"], child["metadata"]["name"]) not in kept
    )
