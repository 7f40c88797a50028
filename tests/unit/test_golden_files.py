"""The families' other layouts: GGUF, names without their prefix, what a trainer writes, pooling."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BloomConfig, GPT2Config, GPTJConfig, LlamaConfig, OPTConfig, Qwen2Config

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.errors import UnknownArchitectureError
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.names import to_checkpoint
from mizzen.runtime.model.pooling import Pooling, pool
from mizzen.runtime.parallel.group import RankGroup
from tests.fixtures.tiny_models import TINY, make_model, save_gguf

OLD: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
OPT_350M = OPTConfig(
    **OLD,
    init_std=0.2,
    ffn_dim=90,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
    do_layer_norm_before=False,
)
CONFIGS = {
    "GPT-2": GPT2Config(**OLD, n_positions=64),
    "OPT-350m": OPT_350M,
    "BLOOM": BloomConfig(**OLD),
    "GPT-J": GPTJConfig(**OLD, n_positions=64, rotary_dim=6),
    "LLaMA": LlamaConfig(**TINY),
}
LENS = [40, 17]
TOKENS = torch.arange(3, 3 + sum(LENS))


@torch.no_grad()
def hidden(decoder: Decoder) -> Tensor:
    positions = torch.cat([torch.arange(n) for n in LENS])
    return decoder(TOKENS, positions, CausalAttention(LENS))


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(hidden(decoder))


@torch.no_grad()
def reference_logits(model: Any) -> Tensor:
    return torch.cat([model(part[None]).logits[0] for part in TOKENS.split(LENS)])


@pytest.mark.parametrize(
    "config",
    [CONFIGS["GPT-2"], CONFIGS["BLOOM"], Qwen2Config(**TINY)],
    ids=["GPT-2", "BLOOM", "Qwen2"],
)
def test_gguf_equals_transformers(tmp_path: Path, config: Any) -> None:
    model = make_model(config)
    save_gguf(tmp_path / "model.gguf", model)
    decoder = load_decoder(tmp_path / "model.gguf", dtype="float32")
    torch.testing.assert_close(logits(decoder), reference_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_names_may_lack_their_prefix(tmp_path: Path, config: Any) -> None:
    """As in the published files of GPT-2, BLOOM and several embedding models."""
    model = make_model(config)
    model.save_pretrained(tmp_path)
    prefix = f"{model.base_model_prefix}."
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, tmp_path / "model.safetensors")
    decoder = load_decoder(tmp_path, dtype="float32")
    torch.testing.assert_close(logits(decoder), reference_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_was_loaded_is_written_as_it_was(tmp_path: Path, config: Any) -> None:
    make_model(config).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype="float32")
    ours = ((shard.name, shard.tensor) for shard in decoder.shards())
    names = family_named(decoder.spec.family).names
    found = to_checkpoint(ours, names, head_dim=decoder.spec.head_dim)
    expected = load_file(tmp_path / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_parts_of_two_ranks_are_the_whole(tmp_path: Path, config: Any) -> None:
    make_model(config).save_pretrained(tmp_path)
    whole = {s.name: s.tensor for s in load_decoder(tmp_path, dtype="float32").shards()}
    parts = [load_decoder(tmp_path, dtype="float32", group=RankGroup(rank, 2)) for rank in (0, 1)]
    for left, right in zip(*(part.shards() for part in parts), strict=True):
        dim = 0 if left.rows is not None else 1 if left.columns is not None else None
        joined = left.tensor if dim is None else torch.cat((left.tensor, right.tensor), dim)
        assert torch.equal(joined, whole[left.name]), left.name


@pytest.mark.parametrize("kind", ["mean", "last"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_embeddings_equal_transformers(tmp_path: Path, config: Any, kind: Pooling) -> None:
    model = make_model(config)
    model.save_pretrained(tmp_path)
    found = pool(hidden(load_decoder(tmp_path, dtype="float32")), LENS, kind)
    for part, vector in zip(TOKENS.split(LENS), found, strict=True):
        with torch.no_grad():
            states = model.base_model(part[None]).last_hidden_state[0]
        expected = states.mean(0) if kind == "mean" else states[-1]
        torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)


REFUSED: dict[str, tuple[Any, str, Any]] = {
    "OPT with bare norms": (OPT_350M, "layer_norm_elementwise_affine", False),
    "BLOOM that adds what was normalised": (
        CONFIGS["BLOOM"],
        "apply_residual_connection_post_layernorm",
        True,
    ),
    "GPT-2 as a decoder of an encoder": (CONFIGS["GPT-2"], "add_cross_attention", True),
}


@pytest.mark.parametrize(("config", "name", "value"), REFUSED.values(), ids=REFUSED)
def test_variants_we_do_not_compute_are_refused(config: Any, name: str, value: Any) -> None:
    kinds = {"opt": "OPTForCausalLM", "bloom": "BloomForCausalLM", "gpt2": "GPT2LMHeadModel"}
    document = {
        **config.to_dict(),
        "architectures": [kinds[config.model_type]],
        "dtype": "float32",
        name: value,
    }
    with pytest.raises(UnknownArchitectureError, match=f"sets {name} to {value}") as raised:
        ArchSpec.from_config(document)
    assert raised.value.reason == "UnknownArchitecture"
