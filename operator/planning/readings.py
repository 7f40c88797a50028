"""What one look brings before anything is decided: signals as numbers, a replica's size. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.signals import Engines, Observation, Traffic
from mizzen.operator.planning.throughput import Capacity, Shape, StepCosts, capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """The signals as numbers: None is unknown, be it missing or too old."""

    ready: int
    arrivals_per_s: float | None
    in_flight: float | None
    held: float | None
    running: float | None
    waiting: float | None
    kv_used_ratio: float | None
    attained_ratio: float | None = None  # of the promise's two halves, the worse
    # What the engines did lately: the mean time of a step, and tokens per second.
    step_s: float | None = None
    decoded_per_s: float | None = None
    prefilled_per_s: float | None = None

    @property
    def concurrency(self) -> float | None:
        """Requests that replicas have taken in: those held back for a start do not count."""
        if self.running is None or self.waiting is None:
            return None
        return self.running + self.waiting

    @property
    def is_silent(self) -> bool | None:
        """Whether nobody asks and nothing runs; None where that is not known."""
        counts = (self.arrivals_per_s, self.in_flight, self.held, self.running, self.waiting)
        if any(count for count in counts):
            return False
        return None if None in counts else True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What one replica can do, as far as it is known."""

    costs: StepCosts | None
    shape: Shape | None
    capacity: Capacity | None
    itl_s: float  # the limit that was planned with
    concurrency: float  # per replica, where the capacity is not known
    start_s: float  # a new replica serves after this long, nine times of ten


def read_signals(seen: Observation, rules: ScaleRules) -> Readings:
    """Return the signals as numbers. Without a replica in service, engines have nothing to say."""
    stale = rules.tuning.stale_after_s
    traffic, engines = seen.traffic, seen.engines
    if seen.ready == 0:
        running = waiting = kv_used = 0.0
        return Readings(
            ready=0,
            arrivals_per_s=traffic.arrivals_per_s.fresh(stale),
            in_flight=traffic.in_flight.fresh(stale),
            held=traffic.held.fresh(stale),
            running=running,
            waiting=waiting,
            kv_used_ratio=kv_used,
            attained_ratio=_attained_ratio(traffic, stale),
        )
    return Readings(
        ready=seen.ready,
        arrivals_per_s=traffic.arrivals_per_s.fresh(stale),
        in_flight=traffic.in_flight.fresh(stale),
        held=traffic.held.fresh(stale),
        running=engines.running.fresh(stale),
        waiting=engines.waiting.fresh(stale),
        kv_used_ratio=engines.kv_used_ratio.fresh(stale),
        attained_ratio=_attained_ratio(traffic, stale),
        step_s=_step_s(engines, stale),
        decoded_per_s=engines.decoded_per_s.fresh(stale),
        prefilled_per_s=engines.prefilled_per_s.fresh(stale),
    )


def _attained_ratio(traffic: Traffic, stale_s: float) -> float | None:
    ratios = (traffic.ttft_ok_ratio.fresh(stale_s), traffic.itl_ok_ratio.fresh(stale_s))
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _step_s(engines: Engines, stale_s: float) -> float | None:
    steps, seconds = engines.steps_per_s.fresh(stale_s), engines.step_seconds_per_s.fresh(stale_s)
    return seconds / steps if steps and seconds is not None else None


def size_replica(history: History, rules: ScaleRules, *, start_s: float) -> Sizing:
    """Return what one replica can do, from what was learned so far."""
    tuning, costs, shape = rules.tuning, history.fit.costs, history.shape
    limit = rules.slo.itl_s
    if limit is None:
        limit = max(tuning.default_itl_s, 4 * costs.per_step_s if costs else 0.0)
    concurrency = tuning.cold_concurrency
    if shape and history.kv_tokens and shape.kv_tokens > 0:
        room = tuning.kv_full_ratio * history.kv_tokens / shape.kv_tokens
        concurrency = max(1.0, min(concurrency, room))
    found = None
    if costs and shape:
        if costs.per_step_s >= limit:
            # No number of replicas keeps this limit; planning for twice the empty step keeps
            # the service alive, and the decision says so.
            limit = 2 * costs.per_step_s
        found = capacity(
            costs,
            shape,
            itl_s=limit,
            kv_tokens=history.kv_tokens,
            kv_full_ratio=tuning.kv_full_ratio,
        )
    return Sizing(
        costs=costs,
        shape=shape,
        capacity=found,
        itl_s=limit,
        concurrency=concurrency,
        start_s=start_s,
    )
