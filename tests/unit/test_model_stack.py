"""All layers in one call give what they give one by one, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.select import paged_attention
from mizzen.runtime.kernels import library
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.packed import Quantization
from tests.fixtures.tiny_models import TINY, make_model

needs_panels = pytest.mark.skipif(
    not library.runs("avx2"), reason="this processor has no AVX2, so no panels"
)
OLD: dict[str, Any] = {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}
OPT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "GPT-2": GPT2Config(**OLD, n_positions=256),
    "OPT": OPTConfig(**OPT, word_embed_proj_dim=64),
    "BLOOM, three heads": BloomConfig(vocab_size=300, hidden_size=96, n_layer=2, n_head=3),
    "GPT-J": GPTJConfig(**OLD, n_positions=256, rotary_dim=8),
    "LLaMA with biases": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "Mistral": MistralConfig(**TINY, sliding_window=9),
    "Qwen2": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "Qwen3": Qwen3Config(**TINY, head_dim=32),
}
QUERIES, CONTEXTS, PAGE = [1, 5, 1, 20], [17, 5, 40, 50], 8


def load(path: Path, config: Any, **options: Any) -> Decoder:
    make_model(config).save_pretrained(path)
    return load_decoder(path, **options)


def step(decoder: Decoder, lora: Any = None) -> tuple[Tensor, Tensor]:
    """A step of two decodes and two prompts: the hidden states, and the KV cache after it."""
    random = torch.Generator().manual_seed(3)
    pages = [-(-context // PAGE) for context in CONTEXTS]
    free = iter(range(1, 1 + sum(pages)))
    batch = PagedBatch.build(
        query_lens=QUERIES,
        context_lens=CONTEXTS,
        block_tables=[[next(free) for _ in range(count)] for count in pages],
        block_tokens=PAGE,
    )
    spec = decoder.spec
    sides = (2, spec.layers, 1 + sum(pages), PAGE, spec.kv_heads, spec.head_dim)
    cache = torch.randn(sides, generator=random).to(decoder.place.dtype)
    ids_T = torch.randint(0, 300, (sum(QUERIES),), generator=random)
    positions = [
        torch.arange(context - new, context) for new, context in zip(QUERIES, CONTEXTS, strict=True)
    ]
    with torch.inference_mode():
        attend = paged_attention(cache, batch)
        return decoder(ids_T, torch.cat(positions), attend, lora), cache


@needs_panels
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_stack_gives_what_its_layers_give(
    tmp_path: Path, family: str, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(tmp_path, CONFIGS[family], dtype="bfloat16", quantization=quantization)
    assert decoder.prepack()
    assert decoder._stack is not None, "no kernels: `python -m mizzen.runtime.kernels.compile`"
    found, cache = step(decoder)
    monkeypatch.setitem(decoder.__dict__, "_stack", None)
    expected, cache_of_layers = step(decoder)
    assert found.isfinite().all()
    assert torch.equal(found, expected)
    assert torch.equal(cache, cache_of_layers)


class Recorder:
    """An adapter that adds nothing, and notes whom it was asked to change."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def delta(self, layer: int, target: str, x_TI: Tensor) -> None:
        self.asked.append((layer, target))


@needs_panels
def test_adapters_are_asked_at_every_layer(tmp_path: Path) -> None:
    decoder = load(tmp_path, CONFIGS["Mistral"], dtype="bfloat16")
    decoder.prepack()
    recorder = Recorder()
    step(decoder, lora=recorder)
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert recorder.asked == [(layer, name) for layer in range(2) for name in names]


def test_other_layers_run_one_by_one(tmp_path: Path) -> None:
    decoder = load(tmp_path / "type", CONFIGS["Mistral"], dtype="float32")
    decoder.prepack()
    assert decoder._stack is None
    post_norm = OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=48)
    decoder = load(tmp_path / "family", post_norm, dtype="bfloat16")
    decoder.prepack()
    assert decoder._stack is None
    assert step(decoder)[0].isfinite().all()


@needs_panels
def test_a_stack_is_found_once_the_last_weight_is_packed(tmp_path: Path) -> None:
    decoder = load(tmp_path, CONFIGS["Qwen3"], dtype="bfloat16")
    assert decoder._stack is None
    before, _ = step(decoder)
    decoder.prepack()
    assert decoder._stack is not None
    after, _ = step(decoder)
    assert (after - before).float().norm() < 0.05 * before.float().norm()
