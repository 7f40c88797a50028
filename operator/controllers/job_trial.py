"""Watches the requests of a promoted adapter for a while, and takes back one that fares badly."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from mizzen.operator.controllers.counted import count_answers
from mizzen.operator.crds.common import Json
from mizzen.operator.crds.promotion import Trial
from mizzen.operator.facts import Facts
from mizzen.operator.planning.promotions import place_of
from mizzen.operator.planning.trial import Decision, Sides, TrialRules, Verdict, decide_trial
from mizzen.operator.status.conditions import parse_rfc3339, rfc3339
from mizzen.operator.status.job_facts import Problem, Promotion
from mizzen.operator.status.reasons import Reason


async def watch_trial(
    promotion: Promotion, job: Json, deployment: Json, facts: Facts, now: datetime
) -> Promotion:
    """Return the promotion as its trial leaves it.

    It begins when every ready replica has the result, and ends before the job says `Promoted`.
    """
    trial = _trial_of(job)
    if trial is None or promotion.was_done or promotion.replaced_by or promotion.problem:
        return promotion
    since = promotion.on_trial_since
    if since is None and not promotion.is_done:
        return promotion
    since = since or rfc3339(now)
    sides = await _sides(job, deployment, facts)
    decision = decide_trial(parse_rfc3339(since), sides, _rules(trial), now=now)
    if decision.verdict is Verdict.TAKE_BACK:
        return replace(promotion, on_trial_since=None, problem=_taken_back(decision))
    if decision.verdict is Verdict.KEEP and promotion.is_done:
        return replace(promotion, on_trial_since=None)
    why = f"{promotion.served_as} serves the result on trial. {decision.why}".rstrip()
    return replace(promotion, on_trial_since=since, problem=Problem(Reason.PROMOTING, why))


def _trial_of(job: Json) -> Trial | None:
    given = (job["spec"].get("promotion") or {}).get("trial")
    return None if given is None else Trial.model_validate(given)


def _rules(trial: Trial) -> TrialRules:
    return TrialRules(
        hold_s=trial.hold_seconds,
        error_ratio=trial.error_ratio,
        ttft_factor=trial.ttft_factor,
        min_requests=trial.min_requests,
    )


async def _sides(job: Json, deployment: Json, facts: Facts) -> Sides | None:
    """Return what was counted of the trial; nothing counted is zero, not unknown."""
    metadata = deployment["metadata"]
    counted = await count_answers((metadata["namespace"], metadata["name"]), facts)
    if counted is None or counted.trials is None:
        return None
    return counted.trials.get((place_of(job), job["status"]["artifact"]["digest"]), Sides())


def _taken_back(decision: Decision) -> Problem:
    return Problem(
        Reason.ROLLED_BACK,
        f"The result was taken back: {decision.why} What it replaced serves again. Change the "
        "data or the learning rate, and submit a new job.",
        is_final=True,
    )
