"""The engine serves families whose attention is not the plain one, batched and chunked."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from transformers import BloomConfig, GPT2Config, MistralConfig

from mizzen.runtime.engine.engine import Engine
from tests.fixtures.engine_models import (
    EOS,
    generate,
    greedy_reference,
    save_served_llama,
    tiny_config,
)
from tests.fixtures.rank_work import random_tokens
from tests.fixtures.tiny_models import TINY, make_model

SERVED: dict[str, Any] = {"vocab_size": 258, "initializer_range": 0.2, "eos_token_id": EOS}
OLD: dict[str, Any] = {**SERVED, "hidden_size": 48, "n_layer": 2, "n_head": 3}
MODELS = {
    "GPT-2": GPT2Config(**OLD, n_positions=128),
    "BLOOM": BloomConfig(**OLD),
    "Mistral with a window": MistralConfig(**{**TINY, **SERVED}, sliding_window=19),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
async def test_greedy_output_is_that_of_transformers(tmp_path: Path, config: Any) -> None:
    save_served_llama(tmp_path)  # for its tokenizer
    model = make_model(config)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(256, 200).tolist()
    prompts = [tokens[:5], tokens[5:38], tokens[38:98], [*tokens[38:70], 7, 8]]
    options = {"max_num_batched_tokens": 24, "max_model_len": 100}
    engine = await asyncio.to_thread(Engine.start, tiny_config(tmp_path, **options))
    try:
        answers = [
            generate(engine, prompt, request_id=str(i), max_tokens=12)
            for i, prompt in enumerate(prompts)
        ]
        found = await asyncio.gather(*answers)
    finally:
        await engine.stop()
    assert found == [greedy_reference(model, prompt, 12) for prompt in prompts]
