"""How soon a job on lent weights stands still once somebody wants them.

    python -m benchmarks.loan_stops MODEL_DIR [--requests 100] [--threads 2]

A LoRA job has the weights, and now and then they are wanted for a quarter of a second. `stop_*_ms`
is from then until the job's thread looks up and sees it, after which it computes nothing more. No
request runs meanwhile: what one pays for a loan is in `loan_latency`.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.loan_latency import write_job
from benchmarks.rows import Rows, percentile
from mizzen.runtime.engine.loan import Loan, read_lent
from mizzen.runtime.model.loader import load_decoder

_STEP_TOKENS = 2048
_SPARE_BYTES = 8 << 30
_REST_S = 0.25
_PATIENCE_S = 60.0


class Wish:
    """Somebody who wants the weights now and then."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seen_at = 0.0
        self._is_seen = threading.Event()

    def is_wanted(self) -> bool:
        """Answer the job's thread, and note when it first heard yes."""
        if self._since is None:
            return False
        if not self._is_seen.is_set():
            self._seen_at = time.perf_counter()
            self._is_seen.set()
        return True

    def want(self) -> float:
        """Want the weights for a while; return the seconds until the job's thread knew."""
        self._is_seen.clear()
        self._since = began_at = time.perf_counter()
        assert self._is_seen.wait(_PATIENCE_S), "the job has ended, or looks up no more"
        time.sleep(_REST_S)
        self._since = None
        return self._seen_at - began_at


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return how soon the job stood still, over all wishes."""
    torch.set_num_threads(arguments.threads)
    decoder = load_decoder(arguments.model)
    decoder.prepack()  # as served weights are
    wish, pauses = Wish(), random.Random(0)
    document = json.dumps(write_job(folder, arguments.model, arguments))
    config = read_lent(document, decoder, arguments.model)
    loan = Loan(
        config,
        decoder,
        wish.is_wanted,
        spare_bytes=lambda: _SPARE_BYTES,
        step_tokens=_STEP_TOKENS,
    )
    loan.start()
    while not loan.step:
        state = loan.state()  # a job that nobody asks about ends
        assert state.exit_code is None, state
        time.sleep(0.1)
    times = []
    for _ in range(arguments.requests):
        time.sleep(pauses.uniform(0.1, 1.0))
        times.append(1e3 * wish.want())
        loan.state()
    steps = loan.step
    loan.ask_to_stop()
    loan.wait()
    return {
        "requests": len(times),
        "stop_p50_ms": round(statistics.median(times), 1),
        "stop_p95_ms": round(percentile(times, 95), 1),
        "stop_max_ms": round(max(times), 1),
        "steps": steps,
    }


def main() -> None:
    """Print a JSON line, then a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loan_stops")
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--sample-words", type=int, default=120)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    rows = Rows(f"Until a loan stands still, {arguments.model.name}, {arguments.threads} threads")
    with TemporaryDirectory() as name:
        rows.add(measure(arguments, Path(name)))
    rows.print_table()


if __name__ == "__main__":
    main()
