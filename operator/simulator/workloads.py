"""Traces made heavier or warped in time, so that one recording tests more than one situation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from mizzen.operator.simulator.traces import Request

_JITTER_S = 1.0


def multiply(requests: Sequence[Request], times: int, *, seed: int = 0) -> list[Request]:
    """Return each request `times` times, the copies within a second of the original.

    Bursts stay bursts: replayed faster, the same trace would become shorter and its bursts
    narrower than any start-up; copies from another hour would average them away.
    """
    chance = random.Random(seed)
    copies = [
        replace(request, arrival_s=request.arrival_s + chance.uniform(0, _JITTER_S))
        for _ in range(times - 1)
        for request in requests
    ]
    return sorted([*requests, *copies], key=lambda request: request.arrival_s)


def ramp(
    requests: Sequence[Request], *, low_per_s: float, high_per_s: float, duration_s: float
) -> list[Request]:
    """Return the trace, repeated as needed, warped so that its rate climbs and falls again.

    The rate goes from `low_per_s` to `high_per_s` over the first half and back over the second;
    the order of lengths and the unevenness of the gaps stay those of the recording.
    """
    total = int((low_per_s + high_per_s) / 2 * duration_s)
    lap_s = requests[-1].arrival_s * len(requests) / max(1, len(requests) - 1)
    laps = (divmod(index, len(requests)) for index in range(total))
    recorded = [
        (lap * lap_s + requests[position].arrival_s, requests[position]) for lap, position in laps
    ]
    end_s = recorded[-1][0] or 1.0
    # How much of the whole work had come by then, had the rate been constant, is what is kept.
    return [
        replace(
            request,
            arrival_s=duration_s * _time_of(at / end_s, low=low_per_s, high=high_per_s),
        )
        for at, request in recorded
    ]


def _time_of(share: float, *, low: float, high: float) -> float:
    """Return when (0 to 1) this share of a triangle's area has passed."""
    if share > 0.5:
        return 1 - _time_of(1 - share, low=low, high=high)
    mean = (low + high) / 2
    # Area until t, t < 1/2: low*t + (high-low)*t^2, which is to be share*mean.
    slope = high - low
    if slope == 0:
        return share
    return (-low + sqrt(low * low + 4 * slope * share * mean)) / (2 * slope)
