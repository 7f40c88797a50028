"""How many replicas the load of this moment needs, before any caution about moving. Pure.

Each rule yields a number and the sentence it came from; the largest wins. A rule whose signals are
unknown yields what the known ones show, and marks the need as incomplete: that may only raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mizzen.operator.planning.demand import MEAN_S, Forecast, forecast
from mizzen.operator.planning.digits import three_digits as _n
from mizzen.operator.planning.fullness import load_ratio, planned_ratio
from mizzen.operator.planning.readings import Readings, Sizing
from mizzen.operator.planning.scale_history import History, WorkLog
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.work import Work, offered_work


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One rule's answer."""

    replicas: int
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The replicas that the load asks for."""

    candidates: tuple[Candidate, ...]
    is_complete: bool  # every signal that a rule needs is known
    work: Work | None = None
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
            start_s, tuning = sizing.start_s, rules.tuning
            seen = forecast(history.work, work.replicas, start_s=start_s, tuning=tuning)
            candidates += [
                replace(each, formula=f"{each.formula}; {_now(work)}")
                for each in _from_work(work.replicas, seen, readings, history, rules, sizing)
            ]
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
        per_s = sizing.capacity.requests_per_s
        count = max(1, math.ceil(_rounded(held / per_s / drain_s)))
        formula = (
            f"first size {count} = ceil({_n(held)} held / {_n(per_s)} each per s / "
            f"{_n(drain_s)} s to drain)"
        )
    else:
        count = max(1, math.ceil(_rounded(held / sizing.concurrency)))
        formula = f"first size {count} = ceil({_n(held)} held / {_n(sizing.concurrency)} each)"
    return Candidate(replicas=count, formula=formula)


def _unsized(work: Work, readings: Readings, rules: ScaleRules) -> Candidate:
    """Without a known capacity nothing is foretold, and at most twice what serves is asked for.

    Too few replicas make requests pile up on them, which reads as yet more work: without a bound
    the first minute of a deployment would end at the maximum.
    """
    most = 2 * max(1, readings.ready)
    ratio = planned_ratio(rules)
    plan = min(most, math.ceil(_rounded(work.replicas / ratio)))
    return Candidate(
        replicas=plan,
        formula=f"guess {plan} = ceil({_n(work.replicas)} replicas of work / "
        f"{_n(ratio)} load ratio), at most {most} until capacity is known; "
        f"{_now(work)}",
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
    ratio = load_ratio(history, rules)
    fullest = tuning.peak_ratio * ratio / planned_ratio(rules)
    log = history.work
    covered = _covered(readings, log, rules)
    steady = max(min(seen.now, covered * ratio / fullest), seen.mean)
    plan = math.ceil(_rounded(steady / ratio))
    over = f"in the mean of {_n(MEAN_S)} s" if steady == seen.mean else "now"
    yield Candidate(
        replicas=plan,
        formula=f"plan {plan} = ceil({_n(steady)} replicas of work {over} / "
        f"{_n(ratio)} load ratio)",
    )
    if log.is_bursty:
        # Bursts are over before a replica that is started for them serves: so a floor is kept.
        yield _burst_floor(log.burst_floor, covered, fullest, rules)
        return
    ahead = max(seen.trend, seen.reserve)
    reserve = math.ceil(_rounded(ahead / fullest))
    yield Candidate(
        replicas=reserve,
        formula=f"reserve {reserve} = ceil({_n(ahead)} replicas of work by the time a new "
        f"replica serves / {_n(fullest)} load ratio)",
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


def _covered(readings: Readings, log: WorkLog, rules: ScaleRules) -> float:
    """Return the work up to which bursts are served: without limit where misses are not allowed.

    A low promise, and one that is kept, allows them. What is not known to be kept is not.
    """
    promise, attained = rules.slo.attainment_ratio, readings.attained_ratio
    is_kept = attained is not None and attained >= promise
    if not log.is_bursty or not is_kept or promise >= rules.tuning.rise_quantile:
        return math.inf
    return rules.tuning.cover_factor * log.covered


def _burst_floor(usual: float, covered: float, fullest: float, rules: ScaleRules) -> Candidate:
    tuning = rules.tuning
    level = tuning.burst_factor * usual
    source = (
        f"{_n(tuning.burst_factor)} x {_n(usual)} replicas of work, exceeded "
        f"{_n(100 * (1 - tuning.rise_quantile))} % of the last half hour"
    )
    if covered < level:
        level = covered
        source = (
            f"{_n(covered)} replicas of work for "
            f"{_n(100 * rules.slo.attainment_ratio)} % of the last half hour's"
        )
    burst = math.ceil(_rounded(level / fullest))
    return Candidate(
        replicas=burst, formula=f"burst {burst} = ceil({source} / {_n(fullest)} load ratio)"
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
        replicas=count,
        formula=f"{name} {count} = ceil({_n(total)} in all / {_n(target)} each)",
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
        replicas=kept,
        formula=f"queue {kept}: {_n(readings.waiting)} waiting is within the target",
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


def _now(work: Work) -> str:
    return f"work now {_n(work.replicas)} = {work.formula}"
