"""A job killed over and over against the same job left alone: do the same weights come out?

    python -m benchmarks.train_resume [--steps 30] [--kills 200] [--seed 0]

Both jobs are real `mizzen train` processes on a tiny random model and real dialogues. A kill is
SIGKILL at a random moment of the undisturbed run's whole life: while weights are read, in a step,
in a commit. When the job is done it starts again from nothing, so that kills come at all steps;
each finished run must have the undisturbed one's weights, and each kill a valid resume.
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
from mizzen.runtime.train.curve import StepRecord, read_history


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
    environment = {
        **os.environ,
        "MIZZEN_TERMINATION_LOG": str(job.with_name("last-word")),
        "MIZZEN_ADMIN_TOKEN_FILE": str(job.with_name("token")),
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def curve(job: Path) -> list[StepRecord]:
    path = job.parent / "checkpoints" / "metrics.jsonl"
    return read_history(path) if path.exists() else []


def run_to_end(job: Path) -> float:
    """Run a job without a kill; return its seconds."""
    began_at = time.monotonic()
    if code := start(job).wait():
        raise SystemExit(f"a run that nobody disturbed exits with {code}")
    return time.monotonic() - began_at


def committed_step(job: Path) -> int:
    """Return the step of the newest committed checkpoint, 0 without one."""
    committed = sorted((job.parent / "checkpoints").glob("step-*"))
    return int(committed[-1].name.removeprefix("step-")) if committed else 0


def kill_after(job: Path, seconds: float) -> bool:
    """Kill a run at this moment; return whether it was done before."""
    process = start(job)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    if code:
        raise SystemExit(f"a resumed run exits with {code}")
    return True


def outcome(job: Path) -> tuple[str, str]:
    """Return what must not differ: the artifact's digest and the curve."""
    word = json.loads(job.with_name("last-word").read_text())
    curve_text = (job.parent / "checkpoints" / "metrics.jsonl").read_text()
    return str(word["artifact"]["digest"]), curve_text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_resume")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder)
        write_tiny_model(shared / "model")
        write_chatterbot(shared / "chat.jsonl", limit=400)
        calm = write_job(shared / "calm", shared, steps=options.steps)
        life_s = run_to_end(calm)
        expected = outcome(calm)
        kills, runs, same = 0, 0, 0
        while kills < options.kills:
            job = write_job(shared / f"killed-{runs}", shared, steps=options.steps)
            while kills < options.kills and not kill_after(job, moments.uniform(0, life_s)):
                kills += 1
            run_to_end(job)
            runs += 1
            same += outcome(job) == expected
            print(f"{kills} kills; {same} of {runs} runs end with the same bytes", flush=True)
        if same != runs:
            raise SystemExit("a killed job ended with other weights or another curve")


if __name__ == "__main__":
    main()
