"""The engine on the small real model."""

import asyncio

import pytest

from hack.models import cache_dir, fetch
from mizzen.runtime.engine.api import GenerationRequest, SamplingParams
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.engine import Engine
from tests.fixtures.engine_models import collect

pytestmark = pytest.mark.model


async def test_it_knows_the_capital_of_france_alone_and_in_company() -> None:
    config = EngineConfig(
        model=fetch(cache_dir()), dtype="bfloat16", max_model_len=512, cpu_threads=1
    )
    engine = await asyncio.to_thread(Engine.start, config)
    try:
        chat = [
            {
                "role": "user",
                "content": "What is the capital city of France? Answer in one sentence.",
            }
        ]
        prompt = tuple(engine.tokenizer.apply_chat_template(chat))
        sampling = SamplingParams(temperature=0, max_tokens=24)
        requests = [
            GenerationRequest(request_id=str(i), prompt_token_ids=prompt, sampling=sampling)
            for i in range(4)
        ]
        for outputs in await asyncio.gather(*(collect(engine, r) for r in requests)):
            assert "Paris" in "".join(output.text for output in outputs)
            assert outputs[-1].finish_reason == "stop"
    finally:
        await engine.stop()
