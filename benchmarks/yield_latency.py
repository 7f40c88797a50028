"""How long a job takes from the wish to stop to its exit, asked at random moments of its life.

    python -m benchmarks.yield_latency --model MODEL [--moments 50] [--steps 12] [--seed 0]

A job that nobody disturbs says how long a life is. Then a job of the same kind is asked at a random
moment of it, as the operator does it: `POST /yield`, or SIGTERM where nobody answers yet. What it
leaves is counted: the steps done, and those that are not in a committed checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.rows import percentile
from benchmarks.train_resume import committed_step, curve, start
from hack.datasets import write_chatterbot
from hack.ports import free_port

TOKEN = "benchmark"
YIELDED = 75


@dataclass(frozen=True)
class Yield:
    """One job that was asked to stop."""

    phase: str
    exit_s: float
    code: int
    lost_steps: int


def write_job(root: Path, model: Path, data: Path, *, steps: int) -> Path:
    root.mkdir()
    (root / "token").write_text(TOKEN)
    job = {
        "job": "benchmark/yield",
        "adaptation": {"type": "lora", "rank": 16, "alpha": 32.0},
        "base_model": str(model),
        "datasets": [{"name": "chat", "path": str(data)}],
        "processing": {"max_seq_len": 256, "holdout_ratio": 0.1},
        "hyperparameters": {"max_steps": steps, "batch_size": 16, "micro_batch": 4},
        "checkpoint": {"directory": str(root / "checkpoints"), "every_steps": 1000},
        "output": {"directory": str(root / "output"), "kind": "adapter"},
        "evaluation": {"suites": [{"name": "holdout", "max_regression_ratio": 1.0}]},
        "admin_port": free_port(),
    }
    path = root / "job.json"
    path.write_text(json.dumps(job))
    return path


def ask(job: Path, process: subprocess.Popen[bytes]) -> str:
    """Ask a job to stop; return the phase it was in."""
    url = f"http://127.0.0.1:{json.loads(job.read_text())['admin_port']}"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    try:
        progress = urllib.request.Request(f"{url}/progress", headers=headers)
        with urllib.request.urlopen(progress, timeout=5) as answer:
            phase = str(json.load(answer)["phase"])
        wish = urllib.request.Request(f"{url}/yield", b"{}", headers)
        urllib.request.urlopen(wish, timeout=5).close()
        return phase
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        process.send_signal(signal.SIGTERM)
        return "Starting"


def yield_at(job: Path, moment_s: float) -> Yield | None:
    """Ask a job after this many seconds; None if it was over by then."""
    process = start(job)
    try:
        process.wait(moment_s)
        return None
    except subprocess.TimeoutExpired:
        pass
    asked_at = time.monotonic()
    phase = ask(job, process)
    code = process.wait()
    exit_s = time.monotonic() - asked_at
    lost = len(curve(job)) - committed_step(job)
    return Yield(phase, exit_s, code, lost)


def report(yields: list[Yield]) -> None:
    for phase, count in Counter(one.phase for one in yields).items():
        waits = [one.exit_s for one in yields if one.phase == phase]
        print(f"{phase:<11} {count:>3} asked, longest exit {max(waits):.2f} s")
    waits = [one.exit_s for one in yields]
    # Before its handler stands a trainer ends by the signal itself, with nothing done yet.
    fine = [one for one in yields if one.code in (YIELDED, -signal.SIGTERM)]
    print(f"exit after: median {statistics.median(waits):.2f} s, p95 {percentile(waits, 95):.2f} s")
    print(f"yielded: {len(fine)} of {len(yields)}; finished instead: {count_code(yields, 0)}")
    print(f"steps done and not committed, most: {max(one.lost_steps for one in yields)}")


def count_code(yields: list[Yield], code: int) -> int:
    return sum(one.code == code for one in yields)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.yield_latency")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = root / "chat.jsonl"
        write_chatterbot(data, limit=400)
        calm = write_job(root / "calm", options.model, data, steps=options.steps)
        began_at = time.monotonic()
        if code := start(calm).wait():
            raise SystemExit(f"a run that nobody disturbed exits with {code}")
        life_s = time.monotonic() - began_at
        print(f"a life is {life_s:.1f} s")
        yields: list[Yield] = []
        number = 0
        while len(yields) < options.moments:
            job = write_job(root / f"job-{number}", options.model, data, steps=options.steps)
            number += 1
            if one := yield_at(job, moments.uniform(0, life_s)):
                yields.append(one)
        report(yields)


if __name__ == "__main__":
    main()
