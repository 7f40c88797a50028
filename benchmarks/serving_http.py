"""What clients of `mizzen serve` and of `vllm serve` see, side by side on loopback.

    python -m benchmarks.serving_http MODEL_DIR [--concurrency 1 8 32] [--rounds 3]

Same prompts (random token ids, 64 to 192 of them), 128 tokens out, the same threads, in turns;
the client runs on the same cores. Peers: vllm (with our number of threads) and vllm-auto (with the
number that it chooses by itself); --peers without a name measures ours alone. `start_s` runs from
process start to the first token. Ratios are medians over the rounds; with --quantization only ours
computes with fewer bits.
"""

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

from benchmarks.load_generator import Load, run_load
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows, median_ratio
from benchmarks.servers import (
    MODEL_NAME,
    PEERS,
    Server,
    read_once,
    serving,
    start_mizzen,
    start_vllm,
    turn,
    vocab_size,
)


def measure(servers: list[Server], arguments: argparse.Namespace, count: int) -> dict:
    """Let clients ask each server the same, in turns."""
    loads: dict[str, list[Load]] = {server.name: [] for server in servers}
    for round_ in range(arguments.rounds):
        prompts = random_prompts(
            count * arguments.waves,
            shortest=arguments.input_tokens[0],
            longest=arguments.input_tokens[1],
            vocab_size=vocab_size(arguments.model),
            seed=1000 * count + round_,  # new prompts each time: nothing comes from the cache
        )
        for server in servers:
            with turn(server):
                load = run_load(
                    server.url,
                    MODEL_NAME,
                    prompts,
                    output_tokens=arguments.output_tokens,
                    at_once=count,
                )
            loads[server.name].append(load)
    return loads


def as_rows(loads: dict[str, list[Load]], count: int) -> list[dict]:
    """Return medians of each server, and its tokens per second under ours."""
    ours = [load.output_tok_s for load in loads["mizzen"]]
    rows = []
    for name, each in loads.items():
        samples = [load.row() for load in each]
        medians = {key: round(statistics.median(s[key] for s in samples), 2) for key in samples[0]}
        row = {"concurrency": count, "server": name, **medians}
        if name != "mizzen":
            # Ours over theirs: how many times as many tokens ours puts out.
            row["mizzen_over_it"] = median_ratio([load.output_tok_s for load in each], ours)
        rows.append(row)
    return rows


def main() -> None:
    """Print start-up seconds and one JSON line per server and concurrency, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", nargs="*", default=["vllm"], choices=PEERS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--waves", type=int, default=2, help="requests per client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    read_once(model)
    sizes = [
        f"--max-model-len={arguments.input_tokens[1] + arguments.output_tokens}",
        f"--max-num-seqs={max(arguments.concurrency)}",
    ]
    ours = partial(
        start_mizzen,
        model,
        *sizes,
        f"--quantization={arguments.quantization}",
        threads=arguments.threads,
    )
    peers = [
        partial(start_vllm, model, *sizes, "--dtype=bfloat16", threads=arguments.threads, name=name)
        for name in arguments.peers
    ]
    rows = Rows(f"Over HTTP: {model.name}, {arguments.quantization}, {arguments.threads} threads")
    with serving(ours, *peers) as servers:
        for server in servers:
            rows.add({"server": server.name, "start_s": round(server.start_s, 1)})
        for count in arguments.concurrency:
            for row in as_rows(measure(servers, arguments, count), count):
                rows.add(row)
    rows.print_table()


if __name__ == "__main__":
    main()
