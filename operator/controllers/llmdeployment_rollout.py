"""Where a deployment's replicas are to go: to the spec's revision, part of the way, or back.

Pure: the rollout so far is read from the status, everything else from the replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_canary import canary_rules
from mizzen.operator.controllers.llmdeployment_history import known_revisions
from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.llmdeployment_replicas import born_revision
from mizzen.operator.desired.revisions import can_swap, serving_at, weights_path
from mizzen.operator.desired.serving import Serving, made_from
from mizzen.operator.planning.canary import CanaryLook, apply_decision, decide_canary
from mizzen.operator.planning.course import Look, Rollout, Rules, begin, left_s, proceed
from mizzen.operator.planning.rollout import (
    Budget,
    Replica,
    Standing,
    Step,
    soonest,
)
from mizzen.operator.planning.split import Split, canary_split, paused_split, split_step
from mizzen.operator.planning.swap import swap_step
from mizzen.operator.status.causes import first_cause
from mizzen.operator.status.rollout import read_rollout

_POLL_CANARY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What the rollout, if there is one, means for the replicas."""

    target: str  # the revision that all replicas should come to
    servings: Mapping[str, Serving]  # of which revisions replicas are made, and from what
    rollout: Rollout | None = None
    split: Split | None = None  # two revisions stay side by side
    swaps: frozenset[str] = frozenset()  # revisions that new weights turn into the target
    swap_path: str = ""  # of the target's weights, on a claim
    note: str = ""  # what the canary waits for
    look_again_after_s: float | None = None


def plan_course(observed: Observed, canary: CanaryLook | None, *, now: datetime) -> Course:
    """Return where the replicas are to go now."""
    servings = {observed.revision: observed.serving}
    rollout = read_rollout(observed.status)
    for past in (rollout.stable if rollout else "", str(observed.status.get("revision") or "")):
        if past and past not in servings and (serving := _past_serving(observed, past)):
            servings[past] = serving
    rollout = begin(
        rollout,
        wanted=observed.revision,
        before=str(observed.status.get("revision") or ""),
        known=servings,
        has_canary=observed.spec.rollout.canary is not None and not _is_confusing(observed),
        now=now,
    )
    rules = Rules(
        is_paused=observed.spec.rollout.paused,
        rests=observed.desired == 0,
        deadline_s=observed.spec.rollout.progress_deadline_seconds,
    )
    look = _look(observed, rollout.revision if rollout else observed.revision)
    if rollout is not None:
        rollout = proceed(rollout, look, rules, now=now)
    decision = None
    if rollout is not None and rollout.canary is not None and canary is not None:
        steps = canary_rules(observed.spec.rollout.canary)
        decision = decide_canary(rollout.canary, canary, steps, now=now)
        rollout = apply_decision(rollout, decision, steps, now=now)
    if rollout is None:
        return Course(
            target=observed.revision,
            servings={observed.revision: observed.serving},
            swap_path=weights_path(observed.serving.spec),
        )
    target = servings.get(rollout.target)
    swaps = _swaps(observed, rollout, target)
    note = decision.why if decision is not None and rollout.canary is not None else ""
    if rollout.in_place_refused:
        note = f"Replicas are replaced: {rollout.in_place_refused}"
    return Course(
        target=rollout.target,
        swaps=swaps,
        swap_path=weights_path(target.spec) if target else "",
        servings={r: s for r, s in servings.items() if r in (rollout.target, rollout.stable)},
        rollout=rollout,
        split=_split(observed, rollout),
        note=note,
        look_again_after_s=soonest(
            left_s(rollout, look, rules, now=now),
            _POLL_CANARY_S if rollout.canary is not None else None,
        ),
    )


def plan_step(observed: Observed, course: Course, *, now: datetime) -> tuple[Step, Replica | None]:
    """Return which replicas to create, drain and remove, and which to give new weights."""
    rollout = observed.spec.rollout
    budget = Budget(surge=rollout.max_surge, unavailable=rollout.max_unavailable)
    replicas = [group.replica for group in observed.groups]
    if course.split is not None:
        step = split_step(
            replicas, split=course.split, desired=observed.desired, budget=budget, now=now
        )
        return step, None
    return swap_step(
        _without_the_failed(replicas, course),
        revision=course.target,
        swaps=course.swaps,
        desired=observed.desired,
        budget=budget,
        now=now,
    )


def _is_confusing(observed: Observed) -> bool:
    """Whether pods named after the new revision serve another: gateways go by the names."""
    return any(group.replica.born == observed.revision for group in observed.groups)


def _past_serving(observed: Observed, revision: str) -> Serving | None:
    recorded = known_revisions(observed).get(revision)
    if recorded is None:
        return None
    try:
        return serving_at(observed.serving, recorded)
    except ValueError:  # this version of the operator does not understand it any more
        return None


def _look(observed: Observed, revision: str) -> Look:
    there = [group for group in observed.groups if group.standing is not Standing.LEAVING]
    own = [group for group in there if group.replica.revision == revision]
    serving = sum(group.standing is Standing.IN_SERVICE for group in own)
    cause = first_cause(group.cause for group in own if group.cause)
    return Look(
        serving=serving,
        is_complete=serving >= observed.desired,
        is_alone=len(own) == len(there),
        trouble=cause.message if cause else "",
        is_draining=any(
            group.draining_since is not None and group.replica.revision != revision
            for group in observed.groups
        ),
        has_drained=_has_drained(observed, revision),
    )


def _has_drained(observed: Observed, revision: str) -> bool:
    """Whether a pod of another revision that status shows as draining has gone."""
    there = {pod["metadata"]["name"] for group in observed.groups for pod in group.pods}
    return any(
        pod["state"] == "Draining"
        and pod["name"] not in there
        and born_revision(pod["name"]) != revision
        for pod in observed.status.get("pods") or []
    )


def _split(observed: Observed, rollout: Rollout) -> Split | None:
    if rollout.failure is not None:
        return None
    canary = observed.spec.rollout.canary
    if rollout.canary is not None and canary is not None:
        step = canary.steps[min(rollout.canary.step, len(canary.steps) - 1)]
        return canary_split(
            rollout.revision, rollout.stable, weight=step.weight, desired=observed.desired
        )
    if rollout.is_paused:
        replicas = [group.replica for group in observed.groups]
        return paused_split(replicas, rollout.revision, rollout.stable, desired=observed.desired)
    return None


def _swaps(observed: Observed, rollout: Rollout, target: Serving | None) -> frozenset[str]:
    """Return the revisions that other weights turn into the target.

    None where nothing tells any more what the target is made from: it stays as it runs.
    """
    wants = observed.spec.rollout.strategy == "InPlaceWeights" and not rollout.in_place_refused
    if not wants or target is None or target.spec.parallelism.nodes > 1:
        return frozenset()
    after = made_from(target)
    return frozenset(
        revision
        for revision, recorded in known_revisions(observed).items()
        if revision != rollout.target and can_swap(recorded.made_from, after)
    )


def _without_the_failed(replicas: list[Replica], course: Course) -> list[Replica]:
    """Count replicas of a revision that was given up as serving nobody, so that they go first.

    Those that go back in place stay, and serve meanwhile.
    """
    rollout = course.rollout
    if rollout is None or rollout.failure is None:
        return replicas
    is_safe = any(
        r.standing is Standing.IN_SERVICE and r.revision == course.target for r in replicas
    )
    goes = is_safe and rollout.revision not in course.swaps
    return [
        replace(r, standing=Standing.UNREADY)
        if goes and r.revision == rollout.revision and r.standing is Standing.IN_SERVICE
        else r
        for r in replicas
    ]
