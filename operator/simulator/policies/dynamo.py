"""NVIDIA Dynamo's planner in load mode, for engines that do prefill and decode (`agg`)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil

from mizzen.operator.simulator.policies.regression import Fit, fit_plane
from mizzen.operator.simulator.signals import ReplicaSample, Sample, View

_LEAST_OBSERVATIONS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One engine: what is queued and what is being decoded."""

    queued_prompt_tokens: float
    decode_kv_tokens: float
    kv_capacity: float = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """Predicts an engine's latencies from its step times, (prompt tokens, KV tokens) -> seconds."""

    fit: Fit
    mean_prompt_tokens: float  # of a request
    mean_step_prompt_tokens: float  # of a step
    mean_kv_tokens: float  # of a decoding request
    budget_tokens: int

    def ttft_s(self, queued_prompt_tokens: float, kv_tokens: float) -> float:
        """Return the TTFT of a request that came now: the queue and its own prompt, in chunks."""
        left = queued_prompt_tokens + self.mean_prompt_tokens
        chunks = ceil(left / self.budget_tokens)
        full = (chunks - 1) * self.fit.at(self.budget_tokens, kv_tokens) if chunks > 1 else 0.0
        return full + self.fit.at(left - (chunks - 1) * self.budget_tokens, kv_tokens)

    def itl_s(self, kv_tokens: float) -> float:
        """Return the step time with one more request decoding."""
        return self.fit.at(self.mean_step_prompt_tokens, kv_tokens + self.mean_kv_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sla:
    """The promise, and the share of it that must be left for a scale-down."""

    ttft_s: float
    itl_s: float
    sensitivity: float = 0.8


def load_target(loads: list[Load], estimator: Estimator, sla: Sla) -> int:
    """Return one more when all engines miss the TTFT or all miss the ITL, one fewer when safe.

    Safe means: with the load of N engines on N-1, every engine keeps both within the sensitivity.
    Source: ai-dynamo/dynamo: components/src/dynamo/planner/core/load_scaling.py,
    _advance_load_agg, _agg_prefill_scaling, _agg_decode_scaling, _scale_decision.
    """
    count = len(loads)
    ttfts = [estimator.ttft_s(one.queued_prompt_tokens, one.decode_kv_tokens) for one in loads]
    itls = [estimator.itl_s(one.decode_kv_tokens) for one in loads]
    if all(ttft > sla.ttft_s for ttft in ttfts) or all(itl > sla.itl_s for itl in itls):
        return count + 1
    if count > 1 and all(_fits_without_one(one, count, estimator, sla) for one in loads):
        return count - 1
    return count


def _fits_without_one(load: Load, count: int, estimator: Estimator, sla: Sla) -> bool:
    more = count / (count - 1)
    kv_tokens = load.decode_kv_tokens * more
    own_s = estimator.ttft_s(0, kv_tokens)
    queue_s = estimator.ttft_s(load.queued_prompt_tokens * more, kv_tokens) - own_s
    if queue_s >= (sla.ttft_s - own_s) * sla.sensitivity:
        return False
    combined = (load.decode_kv_tokens + load.queued_prompt_tokens) * more
    if combined >= load.kv_capacity:
        return False
    return estimator.itl_s(combined) < sla.itl_s * sla.sensitivity


@dataclass(slots=True)
class DynamoLoad:
    """One replica up or down every 5 s by predicted TTFT and ITL, never while one is changing.

    Trained, as the source's aggregated mode is, on time averages of every worker. Engines that
    were idle give no observation. Without metrics the size stays.
    """

    sla: Sla
    budget_tokens: int = 2048
    name: str = "dynamo-load"
    interval_s: float = 5.0
    scrape_s: float = 5.0
    window_s: float = 10.0
    _observations: deque[tuple[float, float, float]] = field(
        default_factory=lambda: deque(maxlen=64)
    )

    def wanted(self, view: View) -> int:
        """Return the size after this interval."""
        samples = view.within(self.window_s + self.scrape_s)
        if len(samples) < 2:
            return view.current
        before, last = samples[-2], samples[-1]
        pairs = _pairs(before, last)
        self._observe(pairs)
        if view.starting or view.draining or len(last.replicas) != view.ready:
            return view.current
        estimator = self._estimator(pairs, last)
        if estimator is None:
            return view.current
        loads = [
            Load(
                queued_prompt_tokens=one.waiting_prompt_tokens,
                decode_kv_tokens=one.kv_tokens,
                kv_capacity=one.kv_capacity,
            )
            for one in last.replicas
        ]
        return load_target(loads, estimator, self.sla) if loads else view.current

    def _observe(self, pairs: list[tuple[ReplicaSample, ReplicaSample]]) -> None:
        for before, now in pairs:
            steps = now.steps_total - before.steps_total
            if steps > 0:
                prompt_tokens = now.prefilled_tokens_total - before.prefilled_tokens_total
                seconds = now.step_s_total - before.step_s_total
                self._observations.append((prompt_tokens / steps, now.kv_tokens, seconds / steps))

    def _estimator(
        self, pairs: list[tuple[ReplicaSample, ReplicaSample]], last: Sample
    ) -> Estimator | None:
        if len(self._observations) < _LEAST_OBSERVATIONS or not last.requests_total:
            return None
        running = sum(now.running for _, now in pairs)
        kv_tokens = sum(now.kv_tokens for _, now in pairs)
        return Estimator(
            fit=fit_plane(self._observations),
            mean_prompt_tokens=last.prompt_tokens_total / last.requests_total,
            mean_step_prompt_tokens=sum(x for x, _, _ in self._observations)
            / len(self._observations),
            mean_kv_tokens=kv_tokens / running if running else 0.0,
            budget_tokens=self.budget_tokens,
        )


def _pairs(before: Sample, last: Sample) -> list[tuple[ReplicaSample, ReplicaSample]]:
    earlier = {replica.number: replica for replica in before.replicas}
    return [(earlier[r.number], r) for r in last.replicas if r.number in earlier]
