"""A job killed twice against the same job left alone: two loss curves and their difference.

    python -m benchmarks.train_resume [--steps 30] [--kills 2] [--seed 0]

Both jobs are real `mizzen train` processes on a tiny random model and real dialogues; a kill is
SIGKILL at a random step, between or inside commits as chance will have it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from hack.datasets import write_chatterbot
from hack.tiny_model import write_tiny_model
from mizzen.runtime.train.history import StepRecord, read_history


def write_job(root: Path, shared: Path, *, steps: int) -> Path:
    job = {
        "job": "benchmark/resume",
        "adaptation": {"type": "lora", "rank": 8, "alpha": 16.0, "dropout": 0.1},
        "base_model": str(shared / "model"),
        "datasets": [{"name": "chat", "path": str(shared / "chat.jsonl")}],
        "processing": {"max_seq_len": 128, "holdout_ratio": 0.1},
        "hyperparameters": {
            "max_steps": steps,
            "batch_size": 16,
            "micro_batch": 4,
            "learning_rate": 0.005,
            "dtype": "float32",
        },
        "checkpoint": {"directory": str(root / "checkpoints"), "every_steps": 3},
        "output": {"directory": str(root / "output"), "kind": "adapter"},
        "evaluation": {"suites": [{"name": "holdout", "max_regression_ratio": 0.02}]},
        "admin_port": 0,
    }
    root.mkdir()
    path = root / "job.json"
    path.write_text(json.dumps(job))
    return path


def start(job: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mizzen.cli", "train", "--config", str(job)]
    environment = {**os.environ, "MIZZEN_TERMINATION_LOG": str(job.with_name("last-word"))}
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def curve(job: Path) -> list[StepRecord]:
    path = job.parent / "checkpoints" / "metrics.jsonl"
    return read_history(path) if path.exists() else []


def run_to_end(job: Path) -> None:
    code = start(job).wait()
    if code:
        raise SystemExit(f"a run that nobody disturbed exits with {code}")


def kill_at(job: Path, step: int) -> tuple[int, int]:
    """Kill a run once it has done `step`; return the steps done and those it will repeat."""
    process = start(job)
    while len(curve(job)) < step and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    committed = sorted((job.parent / "checkpoints").glob("step-*"))
    resumes_at = int(committed[-1].name.removeprefix("step-")) if committed else 0
    done = len(curve(job))
    return done, done - resumes_at


def print_curves(left: list[StepRecord], right: list[StepRecord]) -> None:
    print(f"{'step':>5} {'undisturbed':>20} {'killed':>20} {'difference':>11}")
    for a, b in zip(left, right, strict=True):
        print(f"{a.step:>5} {a.loss:>20.16f} {b.loss:>20.16f} {abs(a.loss - b.loss):>11.3g}")
    worst = max(abs(a.loss - b.loss) for a, b in zip(left, right, strict=True))
    print(f"largest difference {worst:g} over {len(left)} steps")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_resume")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        write_tiny_model(shared / "model")
        write_chatterbot(shared / "chat.jsonl", limit=400)
        calm = write_job(shared / "calm", shared, steps=options.steps)
        killed = write_job(shared / "killed", shared, steps=options.steps)
        run_to_end(calm)
        for step in sorted(moments.sample(range(1, options.steps), options.kills)):
            done, repeated = kill_at(killed, step)
            print(f"killed after step {done}; {repeated} steps are repeated")
        run_to_end(killed)
        print_curves(curve(calm), curve(killed))
        words = [json.loads(job.with_name("last-word").read_text()) for job in (calm, killed)]
        same = words[0]["artifact"]["digest"] == words[1]["artifact"]["digest"]
        print(f"adapters are {'the same' if same else 'different'} bytes")


if __name__ == "__main__":
    main()
