"""The offline benchmark that small engines publish, on our engine.

    python -m benchmarks.nano_bench [--shape qwen3-0.6b]                       # one GPU
    python -m benchmarks.nano_bench --shape tiny --device cpu --sequences 8    # no GPU needed

256 sequences at once, 100 to 1024 random tokens in, 100 to 1024 out, drawn as nano-vllm's
`bench.py` does (seed 0): 133,966 output tokens. Its README and others' reports give tokens per
second for Qwen3-0.6B on several GPUs; weights here are random, which does not change the speed.
"""

import argparse
import asyncio
import os
import random
import time

import torch

from benchmarks.offline.mizzen_engine import generate_all
from benchmarks.random_models import SHAPES, random_model
from benchmarks.rows import Rows
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine

_PROMPT_IDS = 10000


def draw(
    sequences: int, shortest: int, longest: int, ids: int
) -> tuple[list[list[int]], list[int]]:
    """Return prompts and answer lengths, in nano-vllm's order of drawing."""
    rng = random.Random(0)
    prompts = [
        [rng.randint(0, ids) for _ in range(rng.randint(shortest, longest))]
        for _ in range(sequences)
    ]
    return prompts, [rng.randint(shortest, longest) for _ in range(sequences)]


def main() -> None:
    """Print one JSON line per round, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs=2, default=[100, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began_at = time.perf_counter()
    engine = Engine.start(
        EngineConfig(
            model=random_model(arguments.shape, device=arguments.device),
            dtype="bfloat16",
            device=arguments.device,
            max_model_len=2 * arguments.tokens[1],
            max_num_seqs=arguments.sequences,
            # Every round has the same prompts, as those who published have.
            enable_prefix_caching=False,
        )
    )
    start_s = time.perf_counter() - began_at
    ids = min(_PROMPT_IDS, engine.arch.vocab_size - 1)
    prompts, counts = draw(arguments.sequences, *arguments.tokens, ids)
    rows = Rows(f"{arguments.sequences} sequences at once: {arguments.shape}, {arguments.device}")
    try:
        with asyncio.Runner() as runner:
            runner.run(generate_all(engine, prompts[:2], [8, 8]))
            for round_ in range(arguments.rounds):
                began_at = time.perf_counter()
                came = runner.run(generate_all(engine, prompts, counts))
                took_s = time.perf_counter() - began_at
                rows.add(
                    {
                        "round": round_,
                        "output_tokens": sum(came),
                        "seconds": round(took_s, 2),
                        "tok_s": round(sum(came) / took_s, 1),
                        "engine_start_s": round(start_s, 1),
                    }
                )
    finally:
        asyncio.run(engine.stop())
    rows.print_table()


if __name__ == "__main__":
    main()
