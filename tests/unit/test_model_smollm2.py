"""The real small model computes what transformers computes, from GGUF and from safetensors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hack.models import cache_dir, fetch, to_safetensors
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from tests.fixtures.rank_work import paged_logits, random_tokens

pytestmark = pytest.mark.model

TOKENS = random_tokens(49152, 64)


@pytest.fixture(scope="module")
def gguf() -> Path:
    return fetch(cache_dir())


@pytest.fixture(scope="module")
def expected(gguf: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(TOKENS, torch.arange(64), CausalAttention([64])))


def test_gguf_logits_equal_transformers(gguf: Path, expected: Tensor) -> None:
    decoder = load_decoder(gguf, dtype="float32")
    torch.testing.assert_close(logits(decoder), expected, atol=1e-3, rtol=1e-3)
    decoder.prepack()
    torch.testing.assert_close(logits(decoder), expected, atol=1e-3, rtol=1e-3)
    found = paged_logits(decoder, [30, 20, *[1] * 14])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_bfloat16_safetensors_agree_on_the_next_token(gguf: Path, expected: Tensor) -> None:
    decoder = load_decoder(to_safetensors(gguf.parent), dtype="auto")
    assert decoder.place.dtype == torch.bfloat16
    decoder.prepack()
    found = logits(decoder)
    # Random tokens leave close calls; where the winner is clear, rounding must not change it.
    top = expected.topk(2).values
    is_clear = top[:, 0] - top[:, 1] > 1.0
    assert is_clear.sum() > 10
    assert torch.equal(found.argmax(-1)[is_clear], expected.argmax(-1)[is_clear])
