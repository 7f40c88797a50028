"""Time to first token of a second request with a long shared beginning, cache on and off.

    python -m benchmarks.prefix_cache MODEL_DIR [--prefix-tokens 2048] [--rounds 5]

Two engines in one process, in turns; each round has a new beginning, which both see twice with
other ends. The figure is the second request's time with the cache over that without.
"""

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path

from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows
from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine


async def ttft_s(engine: Engine, prompt: list[int]) -> float:
    """Return the seconds to a prompt's first token."""
    request = GenerationRequest(
        request_id="one",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    )
    began_at = time.perf_counter()
    async for _ in engine.generate(request):
        pass
    return time.perf_counter() - began_at


def second_ttft_s(engine: Engine, beginning: list[int], ends: list[list[int]]) -> float:
    """Return the seconds to the first token of the last of two requests that begin equal."""

    async def both() -> list[float]:
        return [await ttft_s(engine, beginning + end) for end in ends]

    return asyncio.run(both())[-1]


def main() -> None:
    """Print one JSON line per round, one with medians, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--end-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    begin, end = arguments.prefix_tokens, arguments.end_tokens
    engines = {
        is_on: Engine.start(
            EngineConfig(
                model=arguments.model,
                device="cpu",
                cpu_threads=arguments.threads,
                max_model_len=begin + end + 16,
                max_num_seqs=4,
                enable_prefix_caching=is_on,
            )
        )
        for is_on in (True, False)
    }
    rows = Rows(f"Second request with {begin} shared tokens: {arguments.model.name}")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    ids = {"vocab_size": engines[True].arch.vocab_size}
    try:
        for round_ in range(arguments.rounds):
            beginning, *_ = random_prompts(1, shortest=begin, longest=begin, seed=round_, **ids)
            ends = random_prompts(2, shortest=end, longest=end, seed=1000 + round_, **ids)
            for is_on, engine in engines.items():
                seconds[is_on].append(second_ttft_s(engine, beginning, ends))
            rows.add({"round": round_, **_figures(seconds[True][-1], seconds[False][-1])})
    finally:
        for engine in engines.values():
            asyncio.run(engine.stop())
    rows.add({"round": "median", **_figures(*(statistics.median(s) for s in seconds.values()))})
    rows.print_table()


def _figures(on_s: float, off_s: float) -> dict[str, float]:
    return {
        "on_ms": round(1e3 * on_s, 1),
        "off_ms": round(1e3 * off_s, 1),
        "on_over_off": round(on_s / off_s, 3),
    }


if __name__ == "__main__":
    main()
