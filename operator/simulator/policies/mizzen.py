"""Our own autoscaler: the very function that the operator calls, fed with simulated signals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mizzen.operator.planning.scale import Decision, decide
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules, Slo, Tuning
from mizzen.operator.planning.signals import Engines, Observation, Signal, Traffic
from mizzen.operator.simulator.signals import ReplicaSample, Sample, View
from mizzen.operator.simulator.simulation import Setting

_RATE_S = 30.0
_MEAN_S = 300.0


@dataclass(slots=True)
class Mizzen:
    """`planning.scale.decide`, asked every five seconds."""

    rules: ScaleRules
    name: str = "mizzen"
    interval_s: float = 5.0
    scrape_s: float = 5.0
    window_s: float = _MEAN_S
    history: History = field(default_factory=History)
    last: Decision | None = None

    def wanted(self, view: View) -> int:
        """Return the decision's number; the decision itself is kept in `last`."""
        if self.history.desired is None:
            self.history = History(desired=view.current)
        self.last = decide(self.history, observe(view), self.rules)
        self.history = self.last.state
        return self.last.replicas


def rules_of(setting: Setting, tuning: Tuning | None = None) -> ScaleRules:
    """Return what a user with the simulation's bounds and objective would have configured."""
    objective = setting.objective
    return ScaleRules(
        min_replicas=setting.min_replicas,
        max_replicas=setting.max_replicas,
        slo=Slo(
            ttft_s=objective.ttft_s,
            itl_s=objective.itl_s,
            attainment_ratio=objective.attainment_ratio,
        ),
        tuning=tuning or Tuning(),
    )


def observe(view: View) -> Observation:
    """Return the samples as the operator's metrics source would hand them over."""
    last = view.last
    if last is None:
        return Observation(now_s=view.now, replicas=view.replicas)
    return Observation(
        now_s=view.now,
        replicas=view.replicas,
        traffic=_traffic(view, last),
        engines=_engines(view, last),
    )


def _traffic(view: View, last: Sample) -> Traffic:
    age_s = view.newest_age_s()
    first = _earliest(view, last, _RATE_S)
    long_ago = _earliest(view, last, _MEAN_S)
    return Traffic(
        arrivals_per_s=_ratio(last, first, lambda s: s.requests_total, lambda s: s.at, age_s),
        in_flight=Signal(last.in_flight, age_s),
        held=Signal(last.held, age_s),
        ttft_ok_ratio=_ratio(
            last, long_ago, lambda s: s.ttft_met_total, lambda s: s.ttft_total, age_s
        ),
        itl_ok_ratio=_ratio(
            last, long_ago, lambda s: s.itl_met_total, lambda s: s.itl_total, age_s
        ),
    )


def _engines(view: View, last: Sample) -> Engines:
    age_s = view.newest_age_s()
    if not last.replicas:
        return Engines()
    long_ago = _earliest(view, last, _MEAN_S)
    first = _earliest(view, last, _RATE_S)

    def mean(total: Callable[[Sample], float]) -> Signal:
        return _ratio(last, long_ago, total, lambda s: s.finished_total, age_s)

    def rate(total: Callable[[ReplicaSample], float]) -> Signal:
        return _summed_rate(last, first, total, age_s)

    return Engines(
        running=Signal(sum(r.running for r in last.replicas), age_s),
        waiting=Signal(sum(r.waiting for r in last.replicas), age_s),
        kv_used_ratio=Signal(sum(r.kv_ratio for r in last.replicas) / len(last.replicas), age_s),
        kv_tokens=Signal(last.replicas[0].kv_capacity, age_s),
        prompt_tokens=mean(lambda s: s.finished_prompt_tokens_total),
        output_tokens=mean(lambda s: s.finished_output_tokens_total),
        steps_per_s=rate(lambda r: r.steps_total),
        step_seconds_per_s=rate(lambda r: r.step_s_total),
        decoded_per_s=rate(lambda r: r.output_tokens_total),
        prefilled_per_s=rate(lambda r: r.prefilled_tokens_total),
        prompted_per_s=rate(lambda r: r.prompted_tokens_total),
    )


def _earliest(view: View, last: Sample, window_s: float) -> Sample:
    """Return the oldest sample of the window that ends with the last one."""
    found = last
    for sample in reversed(view.samples):
        if sample.at < last.at - window_s:
            break
        found = sample
    return found


def _ratio(
    last: Sample,
    first: Sample,
    part: Callable[[Sample], float],
    whole: Callable[[Sample], float],
    age_s: float,
) -> Signal:
    """Return how much `part` grew for each one that `whole` grew; unknown where it did not."""
    grown = whole(last) - whole(first)
    return Signal((part(last) - part(first)) / grown if grown > 0 else None, age_s)


def _summed_rate(
    last: Sample, first: Sample, total: Callable[[ReplicaSample], float], age_s: float
) -> Signal:
    """Return the sum of the replicas' own rates: counters of one that left are not missed."""
    elapsed_s = last.at - first.at
    if elapsed_s <= 0:
        return Signal(None, age_s)
    before = {replica.number: replica for replica in first.replicas}
    grown = sum(total(r) - total(before[r.number]) for r in last.replicas if r.number in before)
    return Signal(grown / elapsed_s, age_s)
