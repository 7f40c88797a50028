"""Adapters: PEFT's files, PEFT's numbers, and an error that says what to change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import OPTConfig

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.errors import BadAdapterError, ShardTruncatedError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import (
    PATHS,
    LoraConfig,
    LoraSlots,
    TrainableLora,
    load_adapter,
    save_adapter,
)
from tests.fixtures.tiny_models import make_model, save_tiny_llama

TOKENS = torch.arange(3, 43)


def save_peft_adapter(directory: Path, model: Any, *, seed: int, **options: Any) -> PeftModel:
    """Save a random PEFT adapter of the model and return the model with it."""
    torch.manual_seed(seed)
    config = PeftConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(directory)
    return adapted.eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path / "base")
    return tmp_path / "base"


def logits(decoder: Decoder, lora: LoraDelta | None) -> Tensor:
    hidden = decoder(TOKENS, torch.arange(40), CausalAttention([40]), lora)
    return decoder.logits(hidden)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": list(PATHS)},
        {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5},
        {"target_modules": ["v_proj", "o_proj"], "use_rslora": True},
    ],
    ids=["every linear", "two linears and an odd rank", "rank-stabilised"],
)
def test_served_adapter_equals_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    model = save_tiny_llama(tmp_path / "base")
    adapted = save_peft_adapter(tmp_path / "adapter", model, seed=1, **options)
    decoder = load_decoder(tmp_path / "base", dtype="float32")
    slots = LoraSlots(decoder)
    slots.load(1, load_adapter(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(TOKENS[None]).logits[0]
        found = logits(decoder, slots.batch([1], [40]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_each_sequence_of_a_batch_gets_its_own_adapter(tmp_path: Path, base: Path) -> None:
    decoder = load_decoder(base, dtype="float32")
    slots = LoraSlots(decoder)
    for slot, options in ((1, {"target_modules": list(PATHS)}), (2, {"r": 2})):
        options = {"target_modules": ["q_proj", "up_proj"], **options}
        directory = tmp_path / f"adapter-{slot}"
        save_peft_adapter(directory, save_tiny_llama(base), seed=slot, **options)
        slots.load(slot, load_adapter(directory))
    order = [2, 0, 1, 2]
    alone = [
        decoder(TOKENS[:10], torch.arange(10), CausalAttention([10]), slots.batch([slot], [10]))
        for slot in order
    ]
    together = decoder(
        TOKENS[:10].repeat(4),
        torch.arange(10).repeat(4),
        CausalAttention([10] * 4),
        slots.batch(order, [10] * 4),
    )
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(alone[0], alone[1]) and not torch.allclose(alone[0], alone[2])


def test_a_batch_of_base_sequences_costs_nothing(base: Path) -> None:
    assert LoraSlots(load_decoder(base)).batch([0, 0], [3, 1]) is None


def test_peft_reads_what_we_trained(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "base")
    decoder = load_decoder(tmp_path / "base", dtype="float32")
    lora = TrainableLora(decoder, LoraConfig(rank=4, alpha=8, targets=("q_proj", "down_proj")))
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        logits(decoder, lora).square().mean().backward()
        optimizer.step()
    save_adapter(tmp_path / "adapter", lora.adapter(), base_model="base")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = adapted(TOKENS[None]).logits[0]
        torch.testing.assert_close(logits(decoder, lora), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(logits(decoder, None), expected, atol=1e-2)


def test_training_starts_from_the_base_model_and_leaves_it_alone(base: Path) -> None:
    decoder = load_decoder(base, dtype="float32")
    lora = TrainableLora(decoder, LoraConfig(rank=4, alpha=8))
    torch.testing.assert_close(logits(decoder, lora), logits(decoder, None))
    logits(decoder, lora).sum().backward()
    assert all(p.grad is None for p in decoder.parameters())
    assert all(p.grad is not None for p in lora.parameters())


REFUSED = {
    "another method": ({"peft_type": "IA3"}, "only LORA is supported"),
    "DoRA": ({"use_dora": True}, "use_dora, which Mizzen does not compute"),
    "trained biases": ({"bias": "all"}, "bias, which Mizzen does not compute"),
    "trained whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a rank above the limit": ({"r": 128}, "Raise --max-lora-rank"),
    "no rank": ({"r": None}, "states no rank"),
    "a rank that is no number": ({"r": "4"}, "states no rank"),
    "a strength that is no number": ({"lora_alpha": "8"}, "lora_alpha that is no number"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_we_cannot_compute_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    document = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(document))
    with pytest.raises(BadAdapterError, match=message):
        load_adapter(tmp_path, max_rank=64)


def test_an_empty_directory_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(BadAdapterError, match=r"no readable adapter_config\.json"):
        load_adapter(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", hidden_size=32)
    save_peft_adapter(tmp_path / "adapter", other, seed=0, target_modules=["q_proj"])
    with pytest.raises(BadAdapterError, match="Load it on the base model it was trained for"):
        LoraSlots(load_decoder(base)).load(1, load_adapter(tmp_path / "adapter"))


def test_an_adapter_for_a_linear_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    gated = save_tiny_llama(tmp_path / "gated")
    save_peft_adapter(tmp_path / "adapter", gated, seed=0, target_modules=["gate_proj"])
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    make_model(config).save_pretrained(tmp_path / "ungated")
    slots = LoraSlots(load_decoder(tmp_path / "ungated"))
    with pytest.raises(BadAdapterError, match="gate_proj of layer 0 does not fit this model"):
        slots.load(1, load_adapter(tmp_path / "adapter"))


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "base")
    save_peft_adapter(tmp_path / "adapter", model, seed=0, target_modules=["q_proj"])
    with (tmp_path / "adapter" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"rest of another file")
    with pytest.raises(BadAdapterError, match=r"is damaged: .* Copy it again"):
        load_adapter(tmp_path / "adapter")


def test_an_adapter_cut_short_is_refused(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "base")
    save_peft_adapter(tmp_path / "adapter", model, seed=0, target_modules=["q_proj"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ShardTruncatedError, match="cut short"):
        load_adapter(tmp_path / "adapter")
