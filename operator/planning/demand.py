"""The demand on a deployment over the last hour, and how far it may rise. Pure.

Demand is work: one unit keeps one replica busy up to its capacity, so requests of every length
add up. It is kept in buckets of ten seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mizzen.operator.planning.scale_history import WorkLog
from mizzen.operator.planning.scale_rules import Tuning

_MEAN_S = 120.0
_FEWEST_FOR_BURSTS = 12  # buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the work may be by the time a replica that is asked for now serves; in replicas."""

    now: float
    mean: float  # of two minutes
    trend: float  # one start-up ahead
    reserve: float  # the mean plus the largest usual rise within one start-up

    @property
    def peak(self) -> float:
        """The largest of them: what to plan for."""
        return max(self.now, self.mean, self.trend, self.reserve)


def record(log: WorkLog, work: float, *, now_s: float, start_s: float, tuning: Tuning) -> WorkLog:
    """Return the log with one more observation of the work."""
    if log.opened_s is None:
        return replace(log, opened_s=now_s, total=work, count=1)
    if now_s - log.opened_s < tuning.bucket_s:
        return replace(log, total=log.total + work, count=log.count + 1)
    keep = int(tuning.memory_s / tuning.bucket_s)
    buckets = (*log.buckets, log.total / log.count)[-keep:]
    closed = replace(log, buckets=buckets, opened_s=now_s, total=work, count=1)
    return _with_summaries(closed, start_s=start_s, tuning=tuning)


def forecast(log: WorkLog, work: float, *, start_s: float, tuning: Tuning) -> Forecast:
    """Return what to expect, from the log and the work of this moment."""
    recent = (*log.buckets[-int(_MEAN_S / tuning.bucket_s) :], work)
    mean = sum(recent) / len(recent)
    ahead = work + _slope(recent) / tuning.bucket_s * start_s
    return Forecast(
        now=work,
        mean=mean,
        trend=min(max(0.0, ahead), tuning.trend_cap * max(work, mean)),
        reserve=mean + log.rise,
    )


def quantile(values: Sequence[float], ratio: float) -> float:
    """Return the smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(ratio * len(ordered)) - 1)]


def _with_summaries(log: WorkLog, *, start_s: float, tuning: Tuning) -> WorkLog:
    """Return the log with what is worth computing only once per bucket."""
    recent = log.buckets[-int(tuning.burst_window_s / tuning.bucket_s) :]
    limit = tuning.burst_leave if log.is_bursty else tuning.burst_enter
    is_bursty = len(recent) >= _FEWEST_FOR_BURSTS and _roughness(recent, tuning) > limit
    return replace(
        log,
        rise=_usual_rise(log.buckets, steps=math.ceil(start_s / tuning.bucket_s), tuning=tuning),
        is_bursty=is_bursty,
        burst_floor=quantile(recent, tuning.rise_quantile) if is_bursty else 0.0,
    )


def _usual_rise(buckets: Sequence[float], *, steps: int, tuning: Tuning) -> float:
    """Return the quantile of how far the work rose within `steps` buckets of any moment."""
    rises = [
        max(0.0, max(buckets[i + 1 : i + 1 + steps]) - buckets[i]) for i in range(len(buckets) - 1)
    ]
    return quantile(rises, tuning.rise_quantile) if rises else 0.0


def _roughness(buckets: Sequence[float], tuning: Tuning) -> float:
    """Return the coefficient of variation around the moving mean of two minutes."""
    width = int(_MEAN_S / tuning.bucket_s)
    mean = sum(buckets) / len(buckets)
    if mean <= 0:
        return 0.0
    squares = 0.0
    for index, value in enumerate(buckets):
        around = buckets[max(0, index - width // 2) : index + width // 2 + 1]
        squares += (value - sum(around) / len(around)) ** 2
    return math.sqrt(squares / len(buckets)) / mean


def _slope(values: Sequence[float]) -> float:
    """Return the least-squares slope per bucket; zero for fewer than three values."""
    count = len(values)
    if count < 3:
        return 0.0
    middle = (count - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(count))
    return sum((i - middle) * value for i, value in enumerate(values)) / spread
