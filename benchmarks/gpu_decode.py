"""One GPU: tokens per second of a single sequence beside the floor that memory bandwidth sets.

    python -m benchmarks.gpu_decode [--shape llama-8b] [--contexts 128 1024 8192]
    python -m benchmarks.gpu_decode --shape tiny --device cpu --contexts 16      # no GPU needed

A step of one sequence has to read every weight and that sequence's keys and values once, so
`floor_ms` is those bytes over the bandwidth. Bandwidth is measured here, by a copy between two
large arrays (reads and writes both count), or given with --bandwidth-tb-s. Weights are random.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.checkpoint import kv_token_bytes, step_weight_bytes
from benchmarks.offline.mizzen_engine import generate_all
from benchmarks.prompts import random_prompts
from benchmarks.random_models import SHAPES, random_model
from benchmarks.rows import Rows
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine

_COPY_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
_REPEATS = 10


def copy_bandwidth(device: str) -> float:
    """Return bytes read plus bytes written per second by the device's fastest plain copy."""
    source = torch.ones(_COPY_BYTES[device] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    fastest_s = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        began_at = time.perf_counter()
        target.copy_(source)
        _wait(device)
        fastest_s = min(fastest_s, time.perf_counter() - began_at)
    return 2 * source.nbytes / fastest_s


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


async def token_ms(engine: Engine, context: int, output_tokens: int, seed: int) -> float:
    """Return milliseconds per token: a long answer less a short one, so prefill cancels out."""

    async def took_s(count: int, seed: int) -> float:
        ids = {"vocab_size": engine.arch.vocab_size, "seed": seed}
        prompts = random_prompts(1, shortest=context, longest=context, **ids)
        began_at = time.perf_counter()
        await generate_all(engine, prompts, [count])
        return time.perf_counter() - began_at

    short_s = await took_s(2, 2 * seed)
    return 1e3 * (await took_s(output_tokens + 2, 2 * seed + 1) - short_s) / output_tokens


def measure(engine: Engine, model: Path, bandwidth: float, arguments: argparse.Namespace) -> Rows:
    """Print a row per context length."""
    rows = Rows(f"Batch 1, {arguments.shape}, {arguments.device}, {bandwidth / 1e12:.2f} TB/s")
    count = arguments.output_tokens
    with asyncio.Runner() as runner:
        runner.run(token_ms(engine, min(arguments.contexts), count, seed=999))
        for context in arguments.contexts:
            took = [
                runner.run(token_ms(engine, context, count, seed=context + i))
                for i in range(arguments.rounds)
            ]
            read = step_weight_bytes(model) + (context + count / 2) * kv_token_bytes(model)
            floor_ms, median_ms = 1e3 * read / bandwidth, statistics.median(took)
            rows.add(
                {
                    "context": context,
                    "tok_s": round(1e3 / median_ms, 1),
                    "ms_per_token": round(median_ms, 3),
                    "floor_ms": round(floor_ms, 3),
                    "share_of_floor": round(floor_ms / median_ms, 3),
                }
            )
    return rows


def main() -> None:
    """Print one JSON line per context length, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--shape", choices=sorted(SHAPES.keys() - {"gpt2-124m"}), default="llama-8b"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bandwidth-tb-s", type=float)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = random_model(arguments.shape, device=arguments.device)
    # Before the engine takes the device's memory.
    measured = copy_bandwidth(arguments.device)
    bandwidth = 1e12 * arguments.bandwidth_tb_s if arguments.bandwidth_tb_s else measured
    began_at = time.perf_counter()
    engine = Engine.start(
        EngineConfig(
            model=model,
            dtype="bfloat16",
            device=arguments.device,
            max_model_len=max(arguments.contexts) + arguments.output_tokens + 16,
            max_num_seqs=8,
        )
    )
    print(f"engine started in {time.perf_counter() - began_at:.1f} s", flush=True)
    try:
        measure(engine, model, bandwidth, arguments).print_table()
    finally:
        asyncio.run(engine.stop())


if __name__ == "__main__":
    main()
