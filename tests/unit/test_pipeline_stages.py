"""How a model's layers are cut into stages, and what a rank of one of them holds and reads."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BloomConfig, GPT2Config, LlamaConfig, OPTConfig

from mizzen.runtime.errors import PipelineInvalidError
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.safetensors_dir import SafetensorsDir
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.stages import Stages
from tests.fixtures.tiny_models import TINY, make_model, save_tiny_llama

OLD: dict[str, Any] = {"vocab_size": 300, "hidden_size": 48, "n_layer": 5, "n_head": 3}
FAMILIES = {
    "LLaMA": LlamaConfig(**{**TINY, "num_hidden_layers": 5}),
    "LLaMA, tied": LlamaConfig(**{**TINY, "num_hidden_layers": 5, "tie_word_embeddings": True}),
    "GPT-2, tied, with positions": GPT2Config(**OLD, n_positions=64),
    "BLOOM, tied, with a norm at the entry": BloomConfig(**OLD),
    "OPT with narrow token vectors": OPTConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=3,
        ffn_dim=90,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
}


def rank_of(stages: int, *, rank: int, width: int = 1) -> RankGroup:
    """Return a rank that was never connected: loading needs nobody else."""
    place = Stages(stages, rank=rank, size=stages * width)
    return RankGroup(place.place, width, None, place)


@given(layers=st.integers(1, 130), stages=st.integers(1, 64), width=st.integers(1, 8))
def test_every_layer_has_one_stage_and_no_stage_has_two_more_than_another(
    layers: int, stages: int, width: int
) -> None:
    everyone = [Stages(stages, rank=r, size=stages * width) for r in range(stages * width)]
    if layers < stages:
        with pytest.raises(PipelineInvalidError, match=f"pipeline to at most {layers}"):
            everyone[0].layers(layers)
        return
    spans = [place.layers(layers) for place in everyone if place.place == 0]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(layers))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 1
    assert spans[-1].size == -(-layers // stages), "the last is the largest, as plans take it"
    assert sum(place.is_first for place in everyone) == width
    assert sum(place.is_last for place in everyone) == width


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_stages_hold_the_whole_between_them_and_only_a_tied_table_twice(
    tmp_path: Path, config: Any
) -> None:
    make_model(config).save_pretrained(tmp_path)
    whole_decoder = load_decoder(tmp_path, dtype="float32")
    whole = {shard.name: shard.tensor for shard in whole_decoder.shards()}
    held = Counter()
    for rank in range(3):
        decoder = load_decoder(tmp_path, dtype="float32", group=rank_of(3, rank=rank))
        for shard in decoder.shards():
            assert torch.equal(shard.tensor, whole[shard.name]), shard.name
            held[shard.name] += 1
    assert held.keys() == whole.keys()
    twice = {name for name, times in held.items() if times > 1}
    assert twice == ({"model.embed_tokens.weight"} if whole_decoder.spec.tied else set())


@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
def test_a_rank_reads_the_bytes_of_its_own_stage_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_tied: bool
) -> None:
    shape = {"num_hidden_layers": 4, "vocab_size": 256, "tie_word_embeddings": is_tied}
    model = save_tiny_llama(tmp_path, **shape)
    read, read_bytes = SafetensorsDir.read, Counter()

    def counting(self: SafetensorsDir, name: str, **part: Any) -> torch.Tensor:
        tensor = read(self, name, **part)
        read_bytes[rank] += tensor.numel() * tensor.element_size()
        return tensor

    monkeypatch.setattr(SafetensorsDir, "read", counting)
    for rank in range(4):
        load_decoder(tmp_path, dtype="float32", group=rank_of(2, rank=rank, width=2))
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    norm, table = 64 * 4, 256 * 64 * 4
    # Each rank of a stage holds norms whole, and a tied table is held by both ends.
    assert read_bytes.total() == whole + 9 * norm + is_tied * table
    layer = (whole - (1 if is_tied else 2) * table - norm) // 4 - 2 * norm
    assert [read_bytes[rank] for rank in range(4)] == [
        layer + table // 2 + norms * norm for norms in (4, 4, 5, 5)
    ]


def test_a_lone_stage_sends_nothing() -> None:
    place = RankGroup().stages
    assert (place.is_first, place.is_last, place.count) == (True, True, 1)
    x = torch.tensor([7])
    assert place.least(x) is x
    place.meet(x)
