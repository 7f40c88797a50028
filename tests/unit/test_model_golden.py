"""Our decoder computes what transformers computes, on the same files."""

from pathlib import Path

import pytest
import torch

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.loader import load_decoder
from tests.fixtures.tiny_models import save_tiny_llama

SHAPES = {
    "grouped heads": {},
    "tied embeddings": {"tie_word_embeddings": True},
    "nine query and three KV heads": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
    },
    "biases everywhere": {"attention_bias": True, "mlp_bias": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        }
    },
}


@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers(tmp_path: Path, overrides: dict[str, object]) -> None:
    reference = save_tiny_llama(tmp_path, **overrides)
    decoder = load_decoder(tmp_path, dtype="float32")
    token_ids = torch.randint(300, (40,))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        hidden = decoder(token_ids, torch.arange(40), CausalAttention([40]))
        torch.testing.assert_close(decoder.logits(hidden), expected, atol=1e-4, rtol=1e-4)
