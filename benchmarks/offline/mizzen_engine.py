"""The engine as a worker of the comparison, without its server."""

import asyncio
from pathlib import Path

from benchmarks.offline.protocol import Generate, Job, answer_batches
from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine


def load(job: Job) -> Generate:
    """Start the engine."""
    engine = Engine.start(
        EngineConfig(
            model=Path(job.model),
            dtype=job.dtype,
            device="cpu",
            quantization=job.quantization,
            cpu_threads=job.threads,
            max_model_len=job.max_model_len,
            max_num_seqs=job.max_num_seqs,
        )
    )
    runner = asyncio.Runner()

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        return runner.run(generate_all(engine, prompts, [output_tokens] * len(prompts)))

    return generate


async def generate_all(
    engine: Engine, prompts: list[list[int]], output_tokens: list[int]
) -> list[int]:
    """Continue every prompt greedily, all at once; return how many tokens came of each."""

    async def one(index: int, prompt: list[int], count: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        request = GenerationRequest(
            request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling
        )
        return sum([len(output.token_ids) async for output in engine.generate(request)])

    pairs = enumerate(zip(prompts, output_tokens, strict=True))
    return await asyncio.gather(*(one(i, prompt, count) for i, (prompt, count) in pairs))


if __name__ == "__main__":
    answer_batches(load)
