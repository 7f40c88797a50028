"""Output tokens per second of the engine and of transformers' generate, in the same run.

    python -m benchmarks.serving_throughput MODEL_DIR [--concurrency 1 8 32] [--rounds 3]

MODEL_DIR is in Hugging Face layout (`python -m hack.models to-safetensors` makes one). Prompts are
random tokens, answers never end early. Both sides get the same prompts, the same number format and
the same threads, in turns. A busy machine slows both, so only ratios count: `ratio` of tokens per
second, and `cpu_ratio` of processor time per token, which other processes disturb less.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a batch of prompts took."""

    wall_s: float
    cpu_s: float

    @classmethod
    def since(cls, start: "Cost") -> "Cost":
        """Return what was spent since `start`."""
        now = cls.now()
        return cls(now.wall_s - start.wall_s, now.cpu_s - start.cpu_s)

    @classmethod
    def now(cls) -> "Cost":
        """Read both clocks; the processor's counts all threads of this process."""
        return cls(time.perf_counter(), time.process_time())


def random_prompts(
    count: int, *, shortest: int, longest: int, vocab_size: int, seed: int
) -> Prompts:
    """Draw prompts of evenly spread lengths."""
    rng = random.Random(seed)
    return [
        [rng.randrange(vocab_size) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]


async def engine_cost(engine: Engine, prompts: Prompts, output_tokens: int) -> Cost:
    """Return what the engine takes for all prompts at once."""
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)

    async def one(index: int, prompt: list[int]) -> int:
        request = GenerationRequest(
            request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling
        )
        return sum([len(output.token_ids) async for output in engine.generate(request)])

    start = Cost.now()
    counts = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    cost = Cost.since(start)
    assert counts == [output_tokens] * len(prompts)
    return cost


def peer_cost(model: Any, prompts: Prompts, output_tokens: int) -> Cost:
    """Return what transformers takes for all prompts as one padded batch."""
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    start = Cost.now()
    with torch.inference_mode():
        out = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=output_tokens,
            min_new_tokens=output_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    cost = Cost.since(start)
    assert out.shape[1] == longest + output_tokens
    return cost


def compare(engine: Engine, model: Any, arguments: argparse.Namespace, count: int) -> dict:
    """Measure both sides in turns at one concurrency."""
    ours, theirs = [], []
    for round_ in range(arguments.rounds):
        prompts = random_prompts(
            count,
            shortest=arguments.input_tokens[0],
            longest=arguments.input_tokens[1],
            vocab_size=engine.arch.vocab_size,
            seed=1000 * count + round_,  # new prompts each time: nothing comes from the cache
        )
        ours.append(asyncio.run(engine_cost(engine, prompts, arguments.output_tokens)))
        if model is not None:
            theirs.append(peer_cost(model, prompts, arguments.output_tokens))
    row: dict[str, float] = {"concurrency": count}
    for name, costs in (("mizzen", ours), ("transformers", theirs)):
        if costs:
            tokens = count * arguments.output_tokens
            row[f"{name}_tok_s"] = round(tokens / _median(costs).wall_s, 1)
            row[f"{name}_cpu_ms"] = round(1000 * _median(costs).cpu_s / tokens, 2)
    if theirs:
        row["ratio"] = round(_median(theirs).wall_s / _median(ours).wall_s, 2)
        row["cpu_ratio"] = round(_median(theirs).cpu_s / _median(ours).cpu_s, 2)
    return row


def _median(costs: list[Cost]) -> Cost:
    wall_s = statistics.median(cost.wall_s for cost in costs)
    return Cost(wall_s, statistics.median(cost.cpu_s for cost in costs))


def main() -> None:
    """Print one JSON line per concurrency."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-tokens", type=int, nargs=2, default=[64, 192])
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="measure the engine alone")
    arguments = parser.parse_args()
    config = EngineConfig(
        model=arguments.model,
        dtype=arguments.dtype,
        cpu_threads=arguments.threads,
        max_model_len=1024,
        max_num_seqs=max(arguments.concurrency),
    )
    began_at = time.perf_counter()
    engine = Engine.start(config)
    print(json.dumps({"start_s": round(time.perf_counter() - began_at, 2)}), flush=True)
    model = None if arguments.no_peer else _load_peer(arguments)
    try:
        for count in arguments.concurrency:
            print(json.dumps(compare(engine, model, arguments, count)), flush=True)
    finally:
        asyncio.run(engine.stop())


def _load_peer(arguments: argparse.Namespace) -> Any:
    # Seconds, and only with a peer.
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    config = AutoConfig.from_pretrained(arguments.model)
    # A directory made from a GGUF file may still say so, and transformers would then wrap its plain
    # weights in slower layers: the peer would lose for the wrong reason.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = getattr(torch, arguments.dtype)
    return AutoModelForCausalLM.from_pretrained(arguments.model, config=config, dtype=dtype).eval()


if __name__ == "__main__":
    main()
