"""A model spread over ranks computes what one rank, and transformers, compute."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor

from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import site_shapes
from mizzen.runtime.model.packed import Quantization
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.ranks import Ranks
from tests.fixtures import rank_work
from tests.fixtures.tiny_models import save_tiny_llama

SHAPES = {
    "nine query and three KV heads, tied": {
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "intermediate_size": 97,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "one KV head on every rank": {"num_key_value_heads": 1},
}
CHUNKS = {"one chunk": [40], "three chunks": [17, 16, 7], "token by token": [1] * 40}


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    started = Ranks(request.param, rank_work.perform)
    yield started
    started.stop()


def on_all(ranks: Ranks, task: str, *arguments: Any) -> Any:
    """Run the task on every rank and return rank 0's result."""
    ranks.send(json.dumps([task, *arguments]).encode())
    return rank_work.TASKS[task](ranks.group, *arguments)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers(ranks: Ranks, tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = save_tiny_llama(tmp_path, **shape)
    with torch.no_grad():
        expected = reference(rank_work.random_tokens(300, 40)[None]).logits[0]
    for chunks in CHUNKS.values():
        # Prepacked or not: with several ranks a bias takes another way.
        is_packed = len(chunks) == 3
        found = on_all(ranks, "chunked_logits", str(tmp_path), chunks, is_packed)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_spreading_quantized_weights_costs_no_accuracy(
    ranks: Ranks, tmp_path: Path, kind: Quantization
) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    reference = save_tiny_llama(tmp_path, **shape, intermediate_size=192, mlp_bias=True)
    with torch.no_grad():
        expected = reference(rank_work.random_tokens(300, 40)[None]).logits[0]
    arguments = (str(tmp_path), [17, 16, 7], True, kind)
    alone = rank_work.chunked_logits(RankGroup(), *arguments)
    found = on_all(ranks, "chunked_logits", *arguments)
    if kind == "int4":
        # Groups do not reach over ranks, so the weights are the same ones; only the head's inputs
        # are rounded, and a sum in another order may round one of them to the next level.
        assert (found - alone).norm() < 0.01 * alone.norm()
    assert (found - expected).norm() < 1.5 * (alone - expected).norm()


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_of_one_rank_equal_transformers(
    tmp_path: Path, shape: dict[str, Any], chunks: list[int]
) -> None:
    reference = save_tiny_llama(tmp_path, **shape)
    with torch.no_grad():
        expected = reference(rank_work.random_tokens(300, 40)[None]).logits[0]
    found = rank_work.chunked_logits(RankGroup(), str(tmp_path), chunks, False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_served_adapter_equals_peft(ranks: Ranks, tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "base", num_attention_heads=8, num_key_value_heads=4)
    torch.manual_seed(1)
    config = PeftConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
        expected = adapted(rank_work.random_tokens(300, 40)[None]).logits[0]
    adapted.save_pretrained(tmp_path / "adapter")
    paths = [str(tmp_path / "base"), str(tmp_path / "adapter")]
    found = on_all(ranks, "lora_logits", *paths)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_adapter_gradients_equal_one_ranks(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_attention_heads=8, num_key_value_heads=4)
    whole, expected_loss = rank_work.lora_gradients(RankGroup(), str(tmp_path))
    part, loss = on_all(ranks, "lora_gradients", str(tmp_path))
    torch.testing.assert_close(loss, expected_loss)
    decoder = load_decoder(tmp_path, dtype="float32", group=RankGroup(0, ranks.group.size))
    shapes = site_shapes(decoder)
    expected = {site: pair for site, pair in whole.pairs()}
    for site, (a_RI, b_OR) in part.pairs():
        a_grad, b_grad = (matrix.grad for matrix in expected[site])
        want = shapes[site.target].cut(type(expected[site])(a_grad, b_grad))
        torch.testing.assert_close(a_RI.grad, want.a_RI, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(b_OR.grad, want.b_OR, atol=1e-6, rtol=1e-4)


def test_weight_gradients_equal_one_ranks(ranks: Ranks, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_attention_heads=8, num_key_value_heads=4, attention_bias=True)
    whole = rank_work.full_gradients(RankGroup(), str(tmp_path))
    part = on_all(ranks, "full_gradients", str(tmp_path))
    for name, expected in first_part(whole, tmp_path, ranks).items():
        torch.testing.assert_close(part[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_rounded_base_has_the_same_numbers_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, kind: Quantization
) -> None:
    shape = {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
    save_tiny_llama(tmp_path, **shape, intermediate_size=192, tie_word_embeddings=False)
    whole = rank_work.stored_weights(RankGroup(), str(tmp_path), kind)
    part = on_all(ranks, "stored_weights", str(tmp_path), kind)
    for name, expected in first_part(whole, tmp_path, ranks).items():
        torch.testing.assert_close(part[name], expected, atol=0, rtol=1e-6)


def first_part(whole: dict[str, Tensor], path: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Return what rank 0 holds of whole tensors."""
    parts = {}
    decoder = load_decoder(path, dtype="float32", group=RankGroup(0, ranks.group.size))
    for shard in decoder.shards():
        tensor = whole[shard.name]
        if shard.rows is not None:
            tensor = tensor[shard.rows.start : shard.rows.stop]
        if shard.columns is not None:
            tensor = tensor[:, shard.columns.start : shard.columns.stop]
        parts[shard.name] = tensor
    return parts
