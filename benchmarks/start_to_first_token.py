"""Seconds from process start to the first token at a client, ours and vLLM's, in turns.

    python -m benchmarks.start_to_first_token MODEL_DIR [--rounds 2] [--peers vllm]

The model's files are read once before, so both find them in the page cache. vLLM compiles at its
first start and keeps the result: its first row is with what its cache held before, the others with
a filled one.
"""

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

from benchmarks.rows import Rows
from benchmarks.servers import PEERS, read_once, serving, start_mizzen, start_vllm


def main() -> None:
    """Print one JSON line per start, the medians, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", nargs="*", default=["vllm"], choices=PEERS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    model, threads = arguments.model.resolve(), arguments.threads
    read_once(model)
    starts = {"mizzen": partial(start_mizzen, model, threads=threads)}
    for name in arguments.peers:
        flags = ("--dtype=bfloat16", "--max-num-seqs=64")  # as many as ours takes by default
        starts[name] = partial(start_vllm, model, *flags, threads=threads, name=name)
    rows = Rows(f"Process start to first token over HTTP: {model.name}, {threads} threads")
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for round_ in range(arguments.rounds):
        for name, start in starts.items():
            with serving(start) as (server,):
                seconds[name].append(server.start_s)
                rows.add({"round": round_, "server": name, "start_s": round(server.start_s, 2)})
    for name, each in seconds.items():
        median_s = statistics.median(each)
        over = round(median_s / statistics.median(seconds["mizzen"]), 1)
        rows.add({"server": name, "median_s": round(median_s, 2), "over_mizzen": over})
    rows.print_table()


if __name__ == "__main__":
    main()
