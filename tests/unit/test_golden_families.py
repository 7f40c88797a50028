"""Every family computes what transformers computes, on the files that transformers saves.

On one rank and on several; in one chunk, three and token by token; with and without a prefix hit;
and the gradients of a loss.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.names import to_checkpoint
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.ranks import Ranks
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.token_loss import token_losses_sum
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.trainable import full_views
from tests.fixtures import rank_work
from tests.fixtures.tiny_models import TINY, make_model

# Three heads do not divide among two ranks, and are no power of two.
OLD: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {**OLD, "init_std": 0.2, "ffn_dim": 90, "max_position_embeddings": 64}
ODD: dict[str, Any] = {
    **TINY,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 72,
    "head_dim": 8,
}
MODELS: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(**OLD, n_positions=64),
    "GPT-2 with its other scales": GPT2Config(
        **OLD, n_positions=64, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True
    ),
    "OPT": OPTConfig(**OPT, word_embed_proj_dim=48),
    "OPT-350m: norms after, narrow token vectors": OPTConfig(
        **OPT, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "BLOOM": BloomConfig(**OLD),
    "BLOOM with seven heads": BloomConfig(**{**OLD, "num_attention_heads": 7, "hidden_size": 56}),
    "GPT-J": GPTJConfig(**OLD, n_positions=64, rotary_dim=6),
    "LLaMA": LlamaConfig(**ODD),
    "Vicuna": LlamaConfig(**{**TINY, "num_key_value_heads": 4}),
    "Mistral": MistralConfig(**ODD, sliding_window=9),
    "Qwen2": Qwen2Config(**TINY, use_sliding_window=True, sliding_window=11, max_window_layers=1),
    "Qwen3": Qwen3Config(**{**TINY, "head_dim": 24}),
}
TOKENS = rank_work.random_tokens(300, 60).tolist()
FIRST = TOKENS[:40]
SECOND = [*FIRST[:32], *TOKENS[40:48]]  # two blocks of sixteen in common


SPREADS = {"two ranks": (2, 1), "two stages": (2, 2), "two stages of two ranks": (4, 2)}


@pytest.fixture(scope="module", params=SPREADS.values(), ids=SPREADS)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    size, stages = request.param
    started = Ranks(size, rank_work.perform, stages=stages)
    yield started
    started.stop()


def check_logits(group: RankGroup, config: Any, path: Path, tell: Callable[[str], None]) -> None:
    """Compare what `group` computes with transformers; `tell` has the other ranks do so too."""
    model = make_model(config)
    model.save_pretrained(path)
    with torch.no_grad():
        first, second = model(torch.tensor([FIRST, SECOND])).logits
    assert first.std() > 0.3, "logits that hardly differ would hide an error"
    arguments = (str(path), [FIRST, SECOND])
    tell(json.dumps(["golden_logits", *arguments]))
    for way, found in rank_work.golden_logits(group, *arguments).items():
        expected = second[32:] if way == "prefix hit" else first
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=f"{way}: {{}}".format)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_of_several_ranks_equal_transformers(
    ranks: Ranks, tmp_path: Path, config: Any
) -> None:
    check_logits(ranks.group, config, tmp_path, lambda words: ranks.send(words.encode()))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_logits_of_one_rank_equal_transformers(tmp_path: Path, config: Any) -> None:
    check_logits(RankGroup(), config, tmp_path, lambda words: None)


# As published checkpoints of these families spell what transformers writes anew.
SPELLINGS = {
    "hidden_size": "n_embd",
    "n_embd": "hidden_size",
    "num_hidden_layers": "n_layer",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "dtype": "torch_dtype",
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_renamed_fields_mean_the_same(config: PretrainedConfig) -> None:
    names = {"BloomConfig": "BloomForCausalLM", "GPT2Config": "GPT2LMHeadModel"}
    kind = type(config).__name__
    saved = config.to_dict()
    saved["architectures"] = [names.get(kind, kind.replace("Config", "ForCausalLM"))]
    saved["dtype"] = "bfloat16"
    renamed = {SPELLINGS.get(name, name): value for name, value in saved.items()}
    assert renamed.keys() != saved.keys()
    assert ArchSpec.from_config(renamed) == ArchSpec.from_config(saved)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_loss_and_its_gradients_are_transformers(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    model = make_model(config)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype="float32")
    learned = full_views(decoder)
    texts = [np.array(FIRST, np.int32), np.array(SECOND[30:], np.int32)]
    samples = [Sample(text, np.arange(len(text)) > 0) for text in texts]
    ours = token_losses_sum(decoder, pack(samples, torch.device("cpu")), None)
    ours.backward()
    # Labels are shifted, and their losses' mean taken.
    theirs = sum(
        model(ids, labels=ids).loss * (ids.shape[1] - 1)
        for ids in (torch.from_numpy(text).long()[None] for text in texts)
    )
    theirs.backward()
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    names = family_named(decoder.spec.family).names
    gradients = ((view.name, view.of(view.parameter.grad)) for view in learned)
    found = to_checkpoint(gradients, names, head_dim=decoder.spec.head_dim)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-3, rtol=1e-3, msg=name)
