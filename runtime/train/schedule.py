"""How the learning rate moves over a job. Pure."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    total: int,
    peak: float,
    warmup_ratio: float,
    shape: Literal["cosine", "linear", "constant"],
) -> float:
    """Return the rate of `step` (the first is 1): a linear rise, then the shape's way down.

    The last step still moves the weights a little: a schedule that ends at exactly zero would
    waste it.
    """
    warmup = max(1, math.ceil(total * warmup_ratio))  # without a rise, the first step is the top
    if step <= warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    left = (total - step + 1) / (total - warmup + 1)
    if shape == "linear":
        return peak * left
    return peak * 0.5 * (1.0 - math.cos(math.pi * left))
