"""How many replicas the load of this moment needs, before any caution about moving. Pure.

Each rule yields a number and the sentence it came from; the largest wins. A rule whose signals are
unknown yields what the known ones show, and marks the need as incomplete: that may only raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mizzen.operator.planning.demand import Forecast, forecast
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules, Tuning
from mizzen.operator.planning.signals import Engines, Observation
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
class Candidate:
    """One rule's answer."""

    replicas: int
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What one replica can do, as far as it is known."""

    costs: StepCosts | None
    shape: Shape | None
    capacity: Capacity | None
    itl_s: float  # the limit that was planned with
    concurrency: float  # per replica, where the capacity is not known
    start_s: float  # a new replica serves after this long, nine times of ten


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The replicas that the load asks for."""

    candidates: tuple[Candidate, ...]
    is_complete: bool  # every signal that a rule needs is known
    work: float | None = None
    forecast: Forecast | None = None

    @property
    def replicas(self) -> int:
        """The largest answer."""
        return max((candidate.replicas for candidate in self.candidates), default=0)

    @property
    def formula(self) -> str:
        """The sentence of the largest answer."""
        if not self.candidates:
            return "no signal is known"
        return max(self.candidates, key=lambda candidate: candidate.replicas).formula


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
        )
    return Readings(
        ready=seen.ready,
        arrivals_per_s=traffic.arrivals_per_s.fresh(stale),
        in_flight=traffic.in_flight.fresh(stale),
        held=traffic.held.fresh(stale),
        running=engines.running.fresh(stale),
        waiting=engines.waiting.fresh(stale),
        kv_used_ratio=engines.kv_used_ratio.fresh(stale),
        step_s=_step_s(engines, stale),
        decoded_per_s=engines.decoded_per_s.fresh(stale),
        prefilled_per_s=engines.prefilled_per_s.fresh(stale),
    )


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


def offered_work(readings: Readings, sizing: Sizing) -> float | None:
    """Return the offered work in replicas, None where it is not known."""
    if sizing.capacity is not None:
        if readings.arrivals_per_s is None:
            return None
        arriving = readings.arrivals_per_s / sizing.capacity.requests_per_s
        served = _served_work(readings, sizing)
        is_keeping_up = not readings.waiting and (readings.step_s or 0.0) <= sizing.itl_s
        if served is None:
            return arriving
        return served if is_keeping_up else max(served, arriving)
    return _guessed_work(readings, sizing)


def _served_work(readings: Readings, sizing: Sizing) -> float | None:
    """Return the work that the engines do, in replicas whose steps take the ITL limit.

    It needs no lengths of requests: those known are of requests that have finished, and the mix
    may have changed since.
    """
    costs, decoded, prefilled = sizing.costs, readings.decoded_per_s, readings.prefilled_per_s
    if costs is None or decoded is None or prefilled is None:
        return None
    seconds = costs.per_sequence_s * decoded + costs.per_prompt_token_s * prefilled
    return seconds / (1 - costs.per_step_s / sizing.itl_s)


def _guessed_work(readings: Readings, sizing: Sizing) -> float | None:
    """Return the work as long as no capacity is known.

    While nothing waits, replicas whose steps are shorter than the ITL limit have room, however
    many requests they hold: how many they can hold differs several-fold between mixes. Long steps
    alone are no proof of load: an empty replica may be as slow.
    """
    if readings.concurrency is None:
        return None
    by_count = readings.concurrency / sizing.concurrency
    if readings.step_s is None or readings.waiting:
        return by_count
    return min(by_count, readings.ready * readings.step_s / sizing.itl_s)


def compute_need(readings: Readings, history: History, rules: ScaleRules, sizing: Sizing) -> Need:
    """Return what the load needs; `history` holds the work up to now."""
    candidates: list[Candidate] = []
    is_complete = True
    work = seen = None
    if rules.slo.is_set or not rules.targets.is_set:
        work = offered_work(readings, sizing)
        is_complete = work is not None and readings.waiting is not None
        if work is not None and sizing.capacity is None:
            candidates.append(_unsized(work, readings, rules))
        elif work is not None:
            tuning = rules.tuning
            seen = forecast(history.work, work, start_s=sizing.start_s, tuning=tuning)
            candidates += _from_work(work, seen, readings, history, rules, sizing)
    for candidate in _from_targets(readings, rules):
        if candidate is None:
            is_complete = False
        else:
            candidates.append(candidate)
    return Need(candidates=tuple(candidates), is_complete=is_complete, work=work, forecast=seen)


def first_size(held: float, history: History, rules: ScaleRules, sizing: Sizing) -> Candidate:
    """Return how many replicas to start from zero, for the requests that are held."""
    drain_s = rules.tuning.drain_s
    if sizing.capacity is not None:
        seconds = held / sizing.capacity.requests_per_s
        count = max(1, math.ceil(_rounded(seconds / drain_s)))
        formula = (
            f"first size {count} = ceil({_n(seconds)} s of held work / {_n(drain_s)} s to drain)"
        )
    else:
        count = max(1, math.ceil(_rounded(held / sizing.concurrency)))
        formula = f"first size {count} = ceil({_n(held)} held / {_n(sizing.concurrency)} each)"
    return Candidate(replicas=count, formula=formula)


def _unsized(work: float, readings: Readings, rules: ScaleRules) -> Candidate:
    """Without a known capacity nothing is foretold, and at most twice what serves is asked for.

    Too few replicas make requests pile up on them, which reads as yet more work: without a bound
    the first minute of a deployment would end at the maximum.
    """
    most = 2 * max(1, readings.ready)
    plan = min(most, math.ceil(_rounded(work / rules.tuning.load_ratio)))
    return Candidate(
        replicas=plan,
        formula=f"guess {plan} = ceil({_n(work)} replicas of work, from requests in flight / "
        f"{_n(rules.tuning.load_ratio)} load ratio), at most {most} until capacity is known",
    )


def _from_work(
    work: float,
    seen: Forecast,
    readings: Readings,
    history: History,
    rules: ScaleRules,
    sizing: Sizing,
) -> Iterator[Candidate]:
    tuning = rules.tuning
    ratio = history.load_ratio or tuning.load_ratio
    steady = max(seen.now, seen.mean)
    plan = math.ceil(_rounded(steady / ratio))
    yield Candidate(
        replicas=plan,
        formula=f"plan {plan} = ceil({_n(steady)} replicas of work / {_n(ratio)} load ratio)",
    )
    fullest = tuning.peak_ratio * ratio / tuning.load_ratio
    if history.work.is_bursty:
        # Bursts are over before a replica that is started for them serves: so a floor is kept,
        # and nothing chases them.
        yield _burst_floor(history.work.burst_floor, fullest, tuning)
        return
    ahead = max(seen.trend, seen.reserve)
    reserve = math.ceil(_rounded(ahead / fullest))
    yield Candidate(
        replicas=reserve,
        formula=f"reserve {reserve} = ceil({_n(ahead)} replicas of work by the time a new "
        f"replica serves / {_n(fullest)})",
    )
    if sizing.costs and history.shape and readings.waiting:
        backlog = readings.waiting + (readings.held or 0.0)
        per_request = sizing.costs.per_prompt_token_s * history.shape.computed
        queued_s = backlog * per_request
        drain = math.ceil(_rounded(work + queued_s / tuning.drain_s))
        yield Candidate(
            replicas=drain,
            formula=f"drain {drain} = ceil({_n(work)} replicas of work + {_n(queued_s)} s of "
            f"queued prompts / {_n(tuning.drain_s)} s)",
        )


def _burst_floor(usual_burst: float, fullest: float, tuning: Tuning) -> Candidate:
    burst = math.ceil(_rounded(tuning.burst_factor * usual_burst / fullest))
    return Candidate(
        replicas=burst,
        formula=f"burst {burst} = ceil({_n(tuning.burst_factor)} x {_n(usual_burst)} replicas of "
        f"work, exceeded {_n(100 * (1 - tuning.rise_quantile))} % of the last half hour / "
        f"{_n(fullest)})",
    )


def _from_targets(readings: Readings, rules: ScaleRules) -> Iterator[Candidate | None]:
    targets = rules.targets
    if targets.concurrency is not None:
        yield _share("concurrency", readings.concurrency, targets.concurrency)
    if targets.queue is not None:
        yield _queue(readings, targets.queue)
    if targets.kv_used_ratio is not None:
        used = readings.kv_used_ratio
        total = None if used is None else used * readings.ready
        yield _share("KV use", total, targets.kv_used_ratio)


def _share(name: str, total: float | None, target: float) -> Candidate | None:
    if total is None:
        return None
    count = math.ceil(_rounded(total / target))
    return Candidate(
        replicas=count, formula=f"{name} {count} = ceil({_n(total)} in all / {_n(target)} each)"
    )


def _queue(readings: Readings, target: float) -> Candidate | None:
    """An empty queue says nothing about how many replicas are spare, so it gives back but one."""
    if readings.waiting is None:
        return None
    spare = max(0, readings.ready - 1) if readings.concurrency else 0
    wanted = math.ceil(_rounded(readings.waiting / target))
    if readings.waiting > target * readings.ready:
        return Candidate(
            replicas=wanted,
            formula=f"queue {wanted} = ceil({_n(readings.waiting)} waiting / {_n(target)} each)",
        )
    kept = readings.ready if readings.waiting else spare
    return Candidate(
        replicas=kept, formula=f"queue {kept}: {_n(readings.waiting)} waiting is within the target"
    )


def slo_problem(history: History, rules: ScaleRules) -> str | None:
    """Return why no number of replicas can keep the promise, None where one may."""
    costs, shape = history.fit.costs, history.shape
    if costs is None or shape is None:
        return None
    limit = rules.slo.itl_s
    if limit is not None and costs.per_step_s >= limit:
        return (
            f"slo.itlMs is {_n(limit * 1000)} and a step of an empty replica takes "
            f"{_n(costs.per_step_s * 1000)} ms. Raise slo.itlMs above that, or give each replica "
            "more or faster devices."
        )
    first = costs.per_step_s + costs.per_prompt_token_s * shape.computed
    if rules.slo.ttft_s is not None and first >= rules.slo.ttft_s:
        return (
            f"slo.ttftMs is {_n(rules.slo.ttft_s * 1000)} and a mean prompt of "
            f"{_n(shape.computed)} tokens alone takes {_n(first * 1000)} ms on an empty replica. "
            "Raise slo.ttftMs above that, or give each replica more or faster devices."
        )
    return None


def _rounded(value: float) -> float:
    """Take away the error of floating point, so that 3.0000000001 replicas are three."""
    return round(value, 6)


def _n(value: float) -> str:
    return f"{value:.3g}"
