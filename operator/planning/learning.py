"""What one look teaches about the replicas: start-up times, step costs, lengths. Pure."""

from __future__ import annotations

from dataclasses import replace

from mizzen.operator.planning.demand import quantile
from mizzen.operator.planning.scale_history import History, Identity
from mizzen.operator.planning.scale_rules import Tuning
from mizzen.operator.planning.signals import Engines, Observation, ReplicaState
from mizzen.operator.planning.throughput import CostFit, Shape, learn

_KEPT_STARTS = 32
# A replica's first minute warms caches and compiles kernels: it would teach false costs
# (ai-dynamo/dynamo#12430).
_WARM_UP_S = 60.0
_FEWEST_STEPS_PER_S = 0.1


def absorb(history: History, seen: Observation, tuning: Tuning) -> History:
    """Return the history with what this look teaches."""
    stale = tuning.stale_after_s
    engines = seen.engines
    kv_tokens = engines.kv_tokens.fresh(stale)
    return replace(
        history,
        starts=(*history.starts, *_new_starts(history, seen, tuning))[-_KEPT_STARTS:],
        started=_started(history, seen),
        fit=_with_costs(history.fit, seen, stale),
        shape=_shape(engines, stale) or history.shape,
        kv_tokens=kv_tokens if kv_tokens else history.kv_tokens,
    )


def usual_start_s(history: History, tuning: Tuning) -> float:
    """Return the time within which nine of ten replicas have started."""
    if not history.starts:
        return tuning.default_start_s
    return quantile(history.starts, 0.9)


def stuck_replicas(history: History, seen: Observation, tuning: Tuning) -> list[ReplicaState]:
    """Return the replicas that should have started long ago."""
    limit = tuning.stuck_after_unmeasured_s
    if history.starts:
        # Twice the slowest start: with few measured, their 99 % quantile is that slowest one.
        limit = max(60.0, 2 * quantile(history.starts, 0.99))
    return [
        replica
        for replica in seen.replicas
        if not replica.is_ready and replica.start_s is None and replica.age_s > limit
    ]


def _new_starts(history: History, seen: Observation, tuning: Tuning) -> list[float]:
    """Return how long those took that have started since the last look.

    At the first look the starts of those that serve are in the status, or were seen by nobody: a
    very long one is then a container that began anew, hours after its pod.
    """
    starts = [
        replica.start_s
        for replica in seen.replicas
        if replica.start_s is not None and _identity(replica, seen) not in (history.started or ())
    ]
    if history.started is not None:
        return starts
    if history.starts:
        return []
    return [start_s for start_s in starts if start_s <= tuning.stuck_after_unmeasured_s]


def _started(history: History, seen: Observation) -> frozenset[Identity]:
    """Return the replicas that have started, whether or not they are ready just now."""
    before = history.started or frozenset()
    identities = {_identity(replica, seen): replica.start_s for replica in seen.replicas}
    return frozenset(
        one for one, start_s in identities.items() if start_s is not None or one in before
    )


def _identity(replica: ReplicaState, seen: Observation) -> Identity:
    """Return its name and when it was made: the next replica in its slot has the same name."""
    return replica.name, round(seen.now_s - replica.age_s)


def _with_costs(fit: CostFit, seen: Observation, stale_s: float) -> CostFit:
    engines = seen.engines
    steps = engines.steps_per_s.fresh(stale_s)
    busy = engines.step_seconds_per_s.fresh(stale_s)
    decoded = engines.decoded_per_s.fresh(stale_s)
    prefilled = engines.prefilled_per_s.fresh(stale_s)
    if steps is None or busy is None or decoded is None or prefilled is None:
        return fit
    is_warming = any(
        replica.is_ready and replica.age_s - (replica.start_s or 0.0) < _WARM_UP_S
        for replica in seen.replicas
    )
    if steps < _FEWEST_STEPS_PER_S or is_warming:
        return fit
    return learn(
        fit,
        step_s=busy / steps,
        sequences=decoded / steps,
        prompt_tokens=prefilled / steps,
    )


def _shape(engines: Engines, stale_s: float) -> Shape | None:
    prompt = engines.prompt_tokens.fresh(stale_s)
    output = engines.output_tokens.fresh(stale_s)
    if not prompt or not output:
        return None  # nothing finished lately: the last known lengths stay
    prompted = engines.prompted_per_s.fresh(stale_s)
    prefilled = engines.prefilled_per_s.fresh(stale_s)
    missed = 1.0
    if prompted and prefilled is not None:
        missed = min(1.0, prefilled / prompted)
    return Shape(prompt=prompt, computed=prompt * missed, output=output)
