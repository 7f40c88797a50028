"""A look at a canary: what the gateways counted of it, and what it says to the probe prompt."""

from __future__ import annotations

from collections.abc import Mapping

from mizzen.operator.controllers.counted import count_answers
from mizzen.operator.controllers.llmdeployment_observe import Observed
from mizzen.operator.controllers.probing import ask_probe
from mizzen.operator.crds.rollout import CanaryRollout
from mizzen.operator.facts import Facts
from mizzen.operator.planning.canary import (
    Answers,
    CanaryLook,
    CanaryRules,
    CanaryStep,
)
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.planning.split import canary_split
from mizzen.operator.status.rollout import read_rollout


def canary_rules(canary: CanaryRollout | None) -> CanaryRules:
    """Return what the spec says of canaries; without it no step is left."""
    if canary is None:
        return CanaryRules(steps=())
    on = canary.rollback_on
    return CanaryRules(
        steps=tuple(CanaryStep(step.weight, step.hold_seconds) for step in canary.steps),
        error_ratio=on.error_ratio,
        ttft_factor=on.ttft_factor,
        min_requests=on.min_requests,
        has_probe=on.probe is not None,
    )


async def look_at_canary(observed: Observed, facts: Facts) -> CanaryLook | None:
    """Return what is seen of the canary, None where there is none."""
    rollout, canary = read_rollout(observed.status), observed.spec.rollout.canary
    if rollout is None or rollout.canary is None or rollout.revision != observed.revision:
        return None
    if canary is None or rollout.canary.step >= len(canary.steps):
        return CanaryLook(serving=0, wanted=0)
    serving = [
        group
        for group in observed.groups
        if group.replica.revision == rollout.revision and group.standing is Standing.IN_SERVICE
    ]
    split = canary_split(
        rollout.revision,
        rollout.stable,
        weight=canary.steps[rollout.canary.step].weight,
        desired=observed.desired,
    )
    probe, said = None, ""
    is_due = rollout.canary.since is None and len(serving) >= max(1, split.new)
    if is_due and canary.rollback_on.probe:
        served_name = observed.spec.model.served_name or observed.serving.name
        probe, said = await ask_probe(
            facts.runtimes, serving[0].address, served_name, canary.rollback_on.probe
        )
    counted = await _answers(observed, facts)
    return CanaryLook(
        serving=len(serving),
        wanted=split.new,
        canary=_of(counted, rollout.revision),
        stable=_of(counted, rollout.stable),
        probe=probe,
        said=said,
    )


async def _answers(observed: Observed, facts: Facts) -> Mapping[str, Answers] | None:
    counted = await count_answers((observed.serving.namespace, observed.serving.name), facts)
    return None if counted is None else counted.answers


def _of(counted: Mapping[str, Answers] | None, revision: str) -> Answers | None:
    """Return what was counted of one revision; nothing counted is zero, not unknown."""
    return None if counted is None else counted.get(revision, Answers())
