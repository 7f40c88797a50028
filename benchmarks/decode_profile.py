"""Where a decode step's time on a CPU goes: operators, our C kernels, and the engine around them.

    python -m benchmarks.decode_profile MODEL_DIR [--rows 8] [--quantization int8] [--top 12]

The model's step is run by itself, as the engine's runner does, on sequences of `--context` tokens,
first timed without the profiler, then with it. `engine_step_ms` is the same number of sequences
through the whole engine; what it has more is scheduling, sampling and streams.

A flame graph of all threads, native frames included:

    uvx py-spy record --native --output flame.svg -- python -m benchmarks.decode_profile MODEL_DIR
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.offline.mizzen_engine import load
from benchmarks.offline.protocol import Job
from benchmarks.prompts import random_prompts
from benchmarks.rows import Rows
from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.kv_room import own_kv
from mizzen.runtime.engine.ranks import load_rank
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.kernels.library import kernels
from mizzen.runtime.parallel.group import RankGroup

_BLOCK = 16
_WARM_STEPS = 8
_KERNELS = (
    "normalise",
    "silu_gate",
    "activate",
    "rotate",
    "paged_attention",
    "linear",
    "run_stack",
)


class Decoding:
    """Sequences that each get one token a step, their KV cache full of zeros."""

    def __init__(self, config: EngineConfig, *, rows: int, context: int, steps: int) -> None:
        decoder = load_rank(config, torch.device("cpu"), RankGroup())
        width = -(-(context + steps) // _BLOCK)
        self._tables = 1 + np.arange(rows * width).reshape(rows, width)  # block 0 is nobody's
        kv = own_kv(config, decoder, blocks=1 + rows * width)
        self._runner = Runner(decoder, kv=kv)
        self._rows, self._context = rows, context

    def step(self) -> None:
        """Compute the next token's logits of every sequence."""
        rows, at = self._rows, self._context
        self._context += 1
        step = StepInput(
            token_ids_T=np.ones(rows, dtype=np.int64),
            positions_T=np.full(rows, at),
            slots_T=self._tables[:, at // _BLOCK] * _BLOCK + at % _BLOCK,
            query_lens=[1] * rows,
            context_lens=[at + 1] * rows,
            block_tables_SB=self._tables[:, : at // _BLOCK + 1],
            sample_at_N=np.arange(rows),
            lora_slots_S=[0] * rows,
        )
        self._runner.run(step)


def step_ms(decoding: Decoding, steps: int) -> float:
    """Return the median milliseconds of a step."""
    took = []
    for _ in range(steps):
        began_at = time.perf_counter()
        decoding.step()
        took.append(1e3 * (time.perf_counter() - began_at))
    return statistics.median(took)


def operators(decoding: Decoding, steps: int, top: int) -> list[dict]:
    """Return what took most, each with its own time only; the rest is Python between them."""
    with _named_kernels(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        began_at = time.perf_counter()
        for _ in range(steps):
            decoding.step()
        took_us = 1e6 * (time.perf_counter() - began_at)
    found = sorted(profiler.key_averages(), key=lambda op: -op.self_cpu_time_total)
    rest_us = took_us - sum(op.self_cpu_time_total for op in found)
    rows = [
        {
            "operator": op.key,
            "ms_per_step": round(op.self_cpu_time_total / steps / 1e3, 3),
            "share": round(op.self_cpu_time_total / took_us, 3),
            "calls_per_step": round(op.count / steps, 1),
        }
        for op in found[:top]
    ]
    outside = {"operator": "outside operators", "ms_per_step": round(rest_us / steps / 1e3, 3)}
    return [*rows, {**outside, "share": round(rest_us / took_us, 3)}]


@contextmanager
def _named_kernels() -> Iterator[None]:
    """Let the profiler see our C kernels, which are no operators of torch."""
    library = kernels()
    plain = {name: getattr(library, name) for name in _KERNELS} if library is not None else {}
    for name, function in plain.items():
        setattr(library, name, record_function(f"mizzen::{name}")(function))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(library, name, function)


def engine_step_ms(job: Job, context: int, steps: int) -> float:
    """Return the milliseconds between two tokens of every sequence, through the whole engine.

    The difference of a long and a short answer to prompts of equal length: prefill cancels out.
    """
    generate = load(job)
    rows = job.max_num_seqs

    def took_s(output_tokens: int, seed: int) -> float:
        prompts = random_prompts(rows, shortest=context, longest=context, vocab_size=256, seed=seed)
        began_at = time.perf_counter()
        generate(prompts, output_tokens)
        return time.perf_counter() - began_at

    took_s(2, seed=0)
    differences = [took_s(steps + 2, 2 * i + 1) - took_s(2, 2 * i + 2) for i in range(3)]
    return 1e3 * statistics.median(differences) / steps


def main() -> None:
    """Print one JSON line with step times, one per operator, and a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=8, help="sequences that decode together")
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--top", type=int, default=12)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        block_size=_BLOCK,
        max_num_seqs=arguments.rows,
    )
    job = Job(
        str(arguments.model),
        threads=arguments.threads,
        max_model_len=arguments.context + arguments.steps + 2,
        max_num_seqs=arguments.rows,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )
    steps = arguments.steps
    decoding = Decoding(
        config,
        rows=arguments.rows,
        context=arguments.context,
        steps=_WARM_STEPS + 2 * steps,
    )
    step_ms(decoding, _WARM_STEPS)
    rows = Rows(f"A decode step of {arguments.rows} sequences: {arguments.model.name}")
    model_ms = step_ms(decoding, steps)
    engine_ms = engine_step_ms(job, arguments.context, steps)
    rows.add({"engine_step_ms": round(engine_ms, 2), "model_step_ms": round(model_ms, 2)})
    for row in operators(decoding, steps, arguments.top):
        rows.add(row)
    rows.print_table()


if __name__ == "__main__":
    main()
