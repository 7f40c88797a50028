"""The loss curve as a file: one JSON line for each step. Needs no package beside Python's own.

It holds no time: what makes the same weights makes the same curve, which is published beside them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

CURVE_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step measured; `loss` is the mean over its scored tokens, before the update."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    measured: dict[str, float] = field(default_factory=dict)  # what only some methods know
    holdout: dict[str, float] = field(default_factory=dict)  # of the weights after this step


def read_history(path: Path) -> list[StepRecord]:
    """Return the curve; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(StepRecord(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return records
