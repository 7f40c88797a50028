"""The loss curve as it is written: beside the checkpoints, by the leader, step after step.

The curve of a job that was interrupted equals, byte for byte, the curve of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from mizzen.runtime.train.curve import CURVE_FILE, StepRecord, read_history
from mizzen.runtime.train.durable import sync_path, write_durably


class LossHistory:
    """Appends to the curve; steps that a resumed job will repeat are cut off first."""

    def __init__(self, directory: Path, *, resumed_step: int) -> None:
        self.path = directory / CURVE_FILE
        directory.mkdir(parents=True, exist_ok=True)
        self.last: StepRecord | None = None
        self.cut(resumed_step)

    def append(self, record: StepRecord) -> None:
        """Add one step's line."""
        with self.path.open("a") as file:
            file.write(_line(record))

    def sync(self) -> None:
        """Force the curve onto the disk; a committed step must not be missing from it."""
        if self.path.exists():
            sync_path(self.path)

    def cut(self, step: int) -> None:
        """Cut off the steps after `step`: they will be repeated."""
        if not self.path.exists():
            return
        kept = [record for record in read_history(self.path) if record.step <= step]
        _rewrite(self.path, kept)
        self.last = kept[-1] if kept else None


def note_holdout(directory: Path, step: int, figures: Mapping[str, float]) -> None:
    """Write down what the holdout said of the weights after `step`, as often as one likes."""
    path = directory / CURVE_FILE
    records = read_history(path) if path.exists() else []
    noted = [replace(r, holdout=dict(figures)) if r.step == step else r for r in records]
    if noted != records:
        _rewrite(path, noted)


def _rewrite(path: Path, records: Iterable[StepRecord]) -> None:
    write_durably(path, "".join(map(_line, records)).encode())


def _line(record: StepRecord) -> str:
    return json.dumps(asdict(record)) + "\n"
