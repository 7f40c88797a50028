"""What a gate compares: how a candidate's figure stands to its base's. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

SuiteType = Literal[
    "perplexity", "preferenceLoss", "reward", "classification", "exactMatch", "winRate"
]

_LIMIT = 700.0  # beyond it a perplexity is no number any more, and nothing else gets that far
_SMALLEST_BASE = 1e-3  # a ratio to nothing at all would say nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A figure made from a sum over the holdout."""

    type: SuiteType
    is_exponential: bool = False
    is_higher_better: bool = False

    def value(self, total: float, weight: float) -> float:
        """Return the figure people read; of a model without numbers it is as bad as can be."""
        mean = total / max(1.0, weight)
        if not math.isfinite(mean):
            mean = -_LIMIT if self.is_higher_better else _LIMIT
        return math.exp(min(mean, _LIMIT)) if self.is_exponential else mean

    def regression_ratio(self, *, base: float, candidate: float) -> float:
        """Return how much worse the candidate is, as a share of its base; negative is better."""
        if self.is_exponential:
            return candidate / base - 1.0
        worse_by = base - candidate if self.is_higher_better else candidate - base
        return worse_by / max(abs(base), _SMALLEST_BASE)


PERPLEXITY = Measure(type="perplexity", is_exponential=True)
PREFERENCE_LOSS = Measure(type="preferenceLoss")
REWARD = Measure(type="reward", is_higher_better=True)
ACCURACY = Measure(type="classification", is_higher_better=True)
EXACT_MATCH = Measure(type="exactMatch", is_higher_better=True)
WIN_RATE = Measure(type="winRate", is_higher_better=True)
