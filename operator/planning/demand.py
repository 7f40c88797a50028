"""The demand on a deployment over the last hour, and how far it may rise. Pure.

Demand is work: one unit keeps one replica busy up to its capacity, so requests of every length
add up. It is kept in buckets of ten seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from mizzen.operator.planning.scale_history import WorkLog
from mizzen.operator.planning.scale_rules import Tuning

MEAN_S = 120.0
_FEWEST_FOR_BURSTS = 30  # buckets: five minutes
_STRETCHES = 6


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


def record(
    log: WorkLog, work: float, *, now_s: float, start_s: float, promise: float, tuning: Tuning
) -> WorkLog:
    """Return the log with one more observation of the work; `promise` is a share of it."""
    if log.opened_s is None:
        return replace(log, opened_s=now_s, total=work, count=1)
    if now_s - log.opened_s < tuning.bucket_s:
        return replace(log, total=log.total + work, count=log.count + 1)
    keep = int(tuning.memory_s / tuning.bucket_s)
    buckets = (*log.buckets, log.total / log.count)[-keep:]
    closed = replace(log, buckets=buckets, opened_s=now_s, total=work, count=1)
    return _with_summaries(closed, start_s=start_s, promise=promise, tuning=tuning)


def forecast(log: WorkLog, work: float, *, start_s: float, tuning: Tuning) -> Forecast:
    """Return what to expect, from the log and the work of this moment."""
    recent = (*log.buckets[-int(MEAN_S / tuning.bucket_s) :], work)
    mean = sum(recent) / len(recent)
    ahead = work + _lasting_slope(recent) / tuning.bucket_s * start_s
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


def covering(work: Sequence[float], share: float) -> float:
    """Return the level below which this share of all the work lies.

    Not of the time: bursts are short and full of requests, so a level that holds for 95 % of the
    seconds may leave half of the requests above it.
    """
    wanted, seen = share * sum(work), 0.0
    for level in sorted(work):
        seen += level
        if seen >= wanted:
            return level
    return max(work, default=0.0)


def _with_summaries(log: WorkLog, *, start_s: float, promise: float, tuning: Tuning) -> WorkLog:
    """Return the log with what is worth computing only once per bucket."""
    recent = log.buckets[-int(tuning.burst_window_s / tuning.bucket_s) :]
    usual = quantile(recent, tuning.rise_quantile)
    is_bursty = _is_bursty(recent, usual, tuning, was_bursty=log.is_bursty)
    return replace(
        log,
        rise=_usual_rise(
            log.buckets,
            steps=max(1, math.ceil(start_s / tuning.bucket_s)),
            ratio=min(promise, tuning.rise_quantile),
            tuning=tuning,
        ),
        is_bursty=is_bursty,
        burst_floor=usual if is_bursty else 0.0,
        covered=covering(recent, promise) if is_bursty else 0.0,
    )


def _usual_rise(buckets: Sequence[float], *, steps: int, ratio: float, tuning: Tuning) -> float:
    """Return how far the work often rises within `steps` buckets.

    The quantile is taken over the whole memory, with nothing risen where it is not filled yet:
    one jump in an hour is no habit, and would else be kept in reserve for an hour.
    """
    rises = sorted(
        (max(buckets[i + 1 : i + 1 + steps]) - buckets[i] for i in range(len(buckets) - 1)),
        reverse=True,
    )
    rare = int((1 - ratio) * tuning.memory_s / tuning.bucket_s)
    return max(0.0, rises[rare]) if len(rises) > rare else 0.0


def _is_bursty(buckets: Sequence[float], usual: float, tuning: Tuning, *, was_bursty: bool) -> bool:
    """Return whether the load comes in bursts, so that a floor is kept for the `usual` one.

    It begins with a burst of that size. Roughness is relative to the mean, which falls as calm
    follows a wave: what was no burst while it lasted would look like one once it is over.
    """
    if len(buckets) < _FEWEST_FOR_BURSTS:
        return False
    if was_bursty:
        return _roughness(buckets, tuning) > tuning.burst_leave
    newest = max(buckets[-_FEWEST_FOR_BURSTS:])
    return newest >= usual and _roughness(buckets, tuning) > tuning.burst_enter


def _roughness(buckets: Sequence[float], tuning: Tuning) -> float:
    """Return the coefficient of variation around the moving mean of two minutes.

    It is taken of six stretches, and the median stretch counts: a single step of the load is
    rough at one place, bursts are rough all over.
    """
    width = int(MEAN_S / tuning.bucket_s)
    mean = sum(buckets) / len(buckets)
    if mean <= 0:
        return 0.0
    squares = []
    for index, value in enumerate(buckets):
        around = buckets[max(0, index - width // 2) : index + width // 2 + 1]
        squares.append((value - sum(around) / len(around)) ** 2)
    size = math.ceil(len(squares) / _STRETCHES)
    stretches = [squares[start : start + size] for start in range(0, len(squares), size)]
    return median(math.sqrt(sum(stretch) / len(stretch)) for stretch in stretches) / mean


def _lasting_slope(values: Sequence[float]) -> float:
    """Return the slope per bucket that all of the values and their last half agree on.

    A jump is over when it is seen; one line through it would carry it on as a ramp.
    """
    return min(_slope(values), _slope(values[len(values) // 2 :]))


def _slope(values: Sequence[float]) -> float:
    """Return the median slope (Theil and Sen); zero for fewer than three values."""
    if len(values) < 3:
        return 0.0
    return median(
        (values[j] - values[i]) / (j - i)
        for i in range(len(values))
        for j in range(i + 1, len(values))
    )
