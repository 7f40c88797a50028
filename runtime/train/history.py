"""The loss curve on disk: one JSON line for each step, beside the checkpoints.

The lines hold no time, so the curve of a job that was interrupted equals, byte for byte, the
curve of one that was not.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mizzen.runtime.train.durable import sync_path, write_durably


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What a step measured; `loss` is the mean over its scored tokens, before the update."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    measured: dict[str, float] = field(default_factory=dict)  # what only some methods know


class LossHistory:
    """Appends to metrics.jsonl; steps that a resumed job will repeat are cut off first."""

    def __init__(self, directory: Path, *, resumed_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self.last: StepRecord | None = None
        self.cut(resumed_step)

    def append(self, record: StepRecord) -> None:
        """Add one step's line."""
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(record)) + "\n")

    def sync(self) -> None:
        """Force the curve onto the disk; a committed step must not be missing from it."""
        if self.path.exists():
            sync_path(self.path)

    def cut(self, step: int) -> None:
        """Cut off the steps after `step`: they will be repeated."""
        if not self.path.exists():
            return
        kept = [record for record in read_history(self.path) if record.step <= step]
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in kept)
        write_durably(self.path, lines.encode())
        self.last = kept[-1] if kept else None


def read_history(path: Path) -> list[StepRecord]:
    """Return the curve; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(StepRecord(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return records
