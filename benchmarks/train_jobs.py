"""Runs of `mizzen train` for benchmarks: a job in, its last words and its curve out."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mizzen.picture import PictureError, check_picture
from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.curve import StepRecord, read_history


@dataclass(frozen=True)
class Done:
    """A job that ran to its end."""

    last_word: dict[str, Any]
    curve: list[StepRecord]
    counters: Counters

    @property
    def artifact(self) -> Path:
        return Path(self.last_word["artifact"]["path"])


def add_plot_option(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be asked for a picture of its curves, if one can be drawn at the end."""
    parser.add_argument("--plot", type=_picture_path, help="picture of the curves: .svg or .png")


def _picture_path(text: str) -> Path:
    path = Path(text)
    try:
        check_picture(path)
    except PictureError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def run_job(root: Path, **document: Any) -> Done:
    """Run a job in `root` as a process of its own."""
    root.mkdir(parents=True)
    path = root / "job.json"
    document = {
        "job": "benchmark/job",
        "checkpoint": {"directory": str(root / "checkpoints"), "every_steps": 1000},
        "output": {"directory": str(root / "output"), "kind": "model"},
        "admin_port": 0,
        **document,
    }
    if document.get("adaptation", {}).get("type") == "lora":
        document["output"]["kind"] = "adapter"
    path.write_text(json.dumps(document))
    log = root / "log"
    with log.open("wb") as stream:
        code = subprocess.call(
            [sys.executable, "-m", "mizzen.cli", "train", "--config", str(path)],
            env={**os.environ, "MIZZEN_TERMINATION_LOG": str(root / "last-word")},
            stderr=stream,
        )
    if code:
        raise SystemExit(f"the job in {root} exits with {code}:\n{log.read_text()}")
    word = json.loads((root / "last-word").read_text())
    return read_done(word, root / "checkpoints")


def read_done(word: dict[str, Any], checkpoints: Path) -> Done:
    """Return what a job left; one that trained nothing has neither curve nor counters."""
    folders = sorted(checkpoints.glob("step-*"))
    if not folders:
        return Done(word, [], Counters())
    manifest = json.loads((folders[-1] / "manifest.json").read_text())
    return Done(word, read_history(checkpoints / "metrics.jsonl"), Counters(**manifest["counters"]))
