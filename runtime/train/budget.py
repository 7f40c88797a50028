"""When a job has used what it may: it then ends with what it has. Pure."""

from __future__ import annotations

from typing import Literal

from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.config import Budget

# The field of the budget that is used up, by its name in the API.
Spent = Literal["maxHours", "maxTokens"]

_MS_PER_HOUR = 3_600_000


def find_spent(budget: Budget, counters: Counters) -> Spent | None:
    """Return what is used up, or None where the job may go on."""
    if budget.max_tokens is not None and counters.tokens >= budget.max_tokens:
        return "maxTokens"
    if budget.max_hours is not None and counters.trained_ms >= budget.max_hours * _MS_PER_HOUR:
        return "maxHours"
    return None
