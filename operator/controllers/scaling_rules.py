"""From a deployment's spec to the rules that `decide` takes. Pure."""

from __future__ import annotations

from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.crds.scaling import DAYS, Scaling, ScalingSchedule
from mizzen.operator.planning.scale_rules import (
    Fallback,
    ScaleRules,
    Schedule,
    Slo,
    Targets,
    Tuning,
)

# This many missed scrapes make a signal too old to act on.
_MISSED_SCRAPES = 3


def rules_of(spec: LLMDeploymentSpec, scaling: Scaling, *, scrape_s: float) -> ScaleRules:
    """Return the rules of a deployment whose metrics are taken every `scrape_s` seconds."""
    slo, targets, budget = scaling.slo, scaling.targets, scaling.budget
    devices = spec.devices_per_replica
    return ScaleRules(
        min_replicas=scaling.min,
        max_replicas=scaling.max,
        slo=Slo()
        if slo is None
        else Slo(
            ttft_s=None if slo.ttft_ms is None else slo.ttft_ms / 1000,
            itl_s=None if slo.itl_ms is None else slo.itl_ms / 1000,
            attainment_ratio=slo.attainment,
        ),
        targets=Targets()
        if targets is None
        else Targets(
            concurrency=targets.concurrency,
            queue=targets.queue,
            kv_used_ratio=targets.kv_used_ratio,
        ),
        schedules=tuple(_schedule(schedule) for schedule in scaling.schedules or ()),
        fallback=None
        if scaling.fallback is None
        else Fallback(replicas=scaling.fallback.replicas, after_s=scaling.fallback.after_seconds),
        to_zero_after_s=None if scaling.idle is None else scaling.idle.to_zero_after_seconds,
        budget_replicas=None if budget is None or not devices else budget.gpus // devices,
        tuning=Tuning(stale_after_s=_MISSED_SCRAPES * scrape_s),
    )


def _schedule(schedule: ScalingSchedule) -> Schedule:
    return Schedule(
        name=schedule.name,
        timezone=schedule.timezone,
        days=frozenset(DAYS.index(day) for day in schedule.days),
        start_minute=_minute(schedule.start),
        end_minute=_minute(schedule.end),
        min_replicas=schedule.min,
        max_replicas=schedule.max,
    )


def _minute(clock: str) -> int:
    hours, minutes = clock.split(":")
    return 60 * int(hours) + int(minutes)
