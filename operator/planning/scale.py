"""How many replicas to want now: the autoscaler's one decision. Pure: no clock, no client.

The same function runs in the operator and in the simulator. What it needs to remember it returns
as `state`, to be handed back as `history`. The steps are in the modules it calls: what one replica
can do (learning, throughput), what the load needs (demand, need), and how the number follows
(steering, idle).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mizzen.operator.planning import idle, learning, steering
from mizzen.operator.planning.need import compute_need, slo_problem
from mizzen.operator.planning.readings import read_signals, size_replica
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.scale_situation import Answer, Situation, Why
from mizzen.operator.planning.schedule import bounds_now
from mizzen.operator.planning.signals import Observation

__all__ = ["Decision", "History", "Observation", "ScaleRules", "Why", "decide"]

# Stuck replicas that are made up for. More would follow a broken image up to the maximum.
_REPLACED_WHEN_STUCK = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer, and all that explains it."""

    at_s: float
    replicas: int
    reason: Why
    formula: str  # with its numbers
    inputs: Mapping[str, float | None]  # None is unknown
    state: History
    is_holding: bool = False  # the gateways shall hold new requests: the last step before zero
    is_capacity_unknown: bool = False
    is_blind: bool = False  # a signal that the rules need is unknown
    is_awaiting_scrape: bool = False  # and only because the replicas have just come
    slo_problem: str | None = None  # why no number of replicas keeps the promise
    stuck: tuple[str, ...] = ()  # replicas that should have started long ago
    limited: str | None = None  # the bound that keeps the number below the need


def decide(history: History, observation: Observation, config: ScaleRules) -> Decision:
    """Return how many replicas to want.

    Raises:
        UnknownTimeZoneError: a schedule cannot be read.
    """
    tuning = config.tuning
    history = learning.absorb(history, observation, tuning)
    stuck = learning.stuck_replicas(history, observation, tuning)
    now = _look(history, observation, config, stuck=len(stuck))
    history = idle.follow_idleness(steering.remember(history, now), now)
    answer, history = _answer(history, now)
    history = replace(history, wake_token=observation.wake.token)
    return Decision(
        at_s=now.now_s,
        replicas=answer.replicas,
        reason=answer.reason,
        formula=answer.formula,
        inputs=_inputs(now, history),
        state=steering.noted(history, answer, now.now_s),
        is_holding=answer.is_holding,
        is_capacity_unknown=now.sizing.capacity is None,
        is_blind=not now.need.is_complete,
        is_awaiting_scrape=now.is_awaiting_scrape,
        slo_problem=slo_problem(history, config),
        stuck=tuple(replica.name for replica in stuck),
        limited=_limit(now),
    )


def _look(history: History, seen: Observation, rules: ScaleRules, *, stuck: int) -> Situation:
    start_s = learning.usual_start_s(history, rules.tuning)
    readings = read_signals(seen, rules)
    sizing = size_replica(history, rules, start_s=start_s)
    bounds = bounds_now(rules, seen.now_s)
    return Situation(
        seen=seen,
        rules=rules,
        bounds=bounds,
        readings=readings,
        sizing=sizing,
        need=compute_need(readings, history, rules, sizing),
        extra=min(stuck, _REPLACED_WHEN_STUCK),
        current=max(1, bounds.low) if history.desired is None else history.desired,
    )


def _answer(history: History, now: Situation) -> tuple[Answer, History]:
    if now.current == 0:
        return idle.from_zero(history, now), history
    if (step := idle.toward_zero(history, now)) is not None:
        return step
    return steering.steer(history, now), history


def _inputs(now: Situation, history: History) -> dict[str, float | None]:
    """Return the figures the answer was made of, by the names that status shows."""
    readings, sizing, need = now.readings, now.sizing, now.need
    found: dict[str, float | None] = {
        "readyReplicas": float(readings.ready),
        "startingReplicas": float(len(now.seen.replicas) - readings.ready),
        "arrivalsPerSecond": readings.arrivals_per_s,
        "inFlight": readings.in_flight,
        "held": readings.held,
        "running": readings.running,
        "waiting": readings.waiting,
        "kvUsedRatio": readings.kv_used_ratio,
        "workReplicas": need.work.replicas if need.work else None,
        "forecastReplicas": need.forecast.peak if need.forecast else None,
        "capacityPerSecond": sizing.capacity.requests_per_s if sizing.capacity else None,
        "itlLimitMs": 1000 * sizing.itl_s,
        "startSeconds": sizing.start_s,
    }
    if history.shape is not None:
        found |= {"promptTokens": history.shape.prompt, "outputTokens": history.shape.output}
    return found


def _limit(now: Situation) -> str | None:
    """Return which bound keeps the number below the need; the text holds no changing number."""
    if now.bounds.unpaid:
        return (
            f"scaling.budget.gpus pays for {now.bounds.high} of the at least {now.bounds.unpaid} "
            f"replicas that are asked for, and at most {now.ceiling} may run. Raise it to what "
            "they take, or ask for fewer."
        )
    if now.need.replicas <= now.ceiling:
        return None
    if now.bounds.is_budget:
        return f"The load needs more than the {now.ceiling} replicas that scaling.budget pays for."
    if now.bounds.schedule:
        return (
            f"The load needs more than the {now.ceiling} replicas that schedule "
            f"{now.bounds.schedule} allows."
        )
    return f"The load needs more than the {now.ceiling} replicas that scaling.max allows."
