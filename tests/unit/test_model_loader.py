"""Weights from every layout we read, whole or in parts, and the errors for broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.errors import (
    BadModelError,
    ShardTruncatedError,
    WeightsMissingError,
)
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.gguf_file import GgufFile
from mizzen.runtime.model.gguf_header import read_gguf_header
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.shard import Span
from tests.fixtures.tiny_models import TINY, make_model, save_gguf, save_tiny_llama

TOKENS = torch.arange(3, 43)


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(TOKENS, torch.arange(40), CausalAttention([40])))


@torch.no_grad()
def reference_logits(model: Any) -> Tensor:
    return model(TOKENS[None]).logits[0]


def test_shards_named_by_an_index_equal_one_file(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = logits(load_decoder(tmp_path, dtype="float32"))
    torch.testing.assert_close(found, reference_logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("is_tied", "quantization"),
    [(True, "F32"), (False, "F32"), (False, "Q8_0")],
    ids=["tied", "own head", "quantized"],
)
def test_gguf_equals_transformers(tmp_path: Path, is_tied: bool, quantization: str) -> None:
    model = save_tiny_llama(tmp_path / "hf", tie_word_embeddings=is_tied)
    save_gguf(tmp_path / "model.gguf", model, quantization=quantization)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    decoder = load_decoder(tmp_path, dtype="float32")
    assert decoder.spec.tied is is_tied
    torch.testing.assert_close(logits(decoder), reference_logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["safetensors", "gguf"])
def test_the_parts_of_three_ranks_are_the_whole(tmp_path: Path, layout: str) -> None:
    shape = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    model = save_tiny_llama(tmp_path, **shape)
    path = tmp_path
    if layout == "gguf":
        path = tmp_path / "model.gguf"
        save_gguf(path, model)
    found: dict[str, Tensor] = {}
    for rank in range(3):
        for shard in load_decoder(path, dtype="float32", group=RankGroup(rank, 3)).shards():
            whole = found.setdefault(
                shard.name, torch.full(model_shape(model, shard.name), torch.nan)
            )
            rows, columns = (s or Span(0, 10**6) for s in (shard.rows, shard.columns))
            view = whole[rows.start : rows.stop]
            (view[:, columns.start : columns.stop] if whole.dim() == 2 else view)[:] = shard.tensor
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)


def model_shape(model: Any, name: str) -> torch.Size:
    return model.state_dict()[name].shape


def test_shards_of_one_rank_are_the_checkpoint(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path)
    decoder = load_decoder(tmp_path, dtype="float32")
    expected = model.state_dict()
    found = {shard.name: shard.tensor for shard in decoder.shards()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "own head"])
def test_prepacking_changes_the_speed_alone(
    tmp_path: Path, dtype: torch.dtype, is_tied: bool
) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=is_tied, attention_bias=True)
    plain, packed = (load_decoder(tmp_path, dtype=dtype) for _ in range(2))
    if not packed.prepack():
        pytest.skip("this torch has no oneDNN")
    bound = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits(packed), logits(plain), atol=bound, rtol=bound)


def test_auto_takes_the_checkpoints_type_but_never_float16(tmp_path: Path) -> None:
    for name, expected in (("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)):
        save_tiny_llama(tmp_path).to(getattr(torch, name)).save_pretrained(tmp_path)
        assert load_decoder(tmp_path, dtype="auto").place.dtype == expected


def cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5])


def empty(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def scribble(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"not json!")


def lengthen(directory: Path) -> None:
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"rest of another file")


def scribble_in_the_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"F32", b"F99", 1))


def forget_a_place(directory: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}).encode()
    file = directory / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def remove_a_shard(directory: Path) -> None:
    weight_map = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def leave_the_directory(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}}))


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def add_layer(directory: Path) -> None:
    change_config(directory, num_hidden_layers=3)


def widen(directory: Path) -> None:
    change_config(directory, intermediate_size=128)


def grow_vocabulary(directory: Path) -> None:
    change_config(directory, vocab_size=320)


def forget_rows(directory: Path) -> None:
    change_config(directory, intermediate_size=64)


BROKEN = {
    "a copy cut short": (cut, "ShardTruncated", "model.safetensors has .* Copy the file again"),
    "a header cut short": (cut_header, "ShardTruncated", "cut short"),
    "an empty file": (empty, "ShardTruncated", "cut short"),
    "a file of something else": (scribble, "NotAModel", "bad header"),
    "more than its header promises": (lengthen, "NotAModel", "is damaged, .* Copy the file again"),
    "a header of nonsense": (scribble_in_the_header, "NotAModel", "is damaged"),
    "a tensor without a place": (forget_a_place, "NotAModel", "bad header"),
    "no weights": (remove_weights, "WeightsMissing", "no .safetensors file"),
    "a shard missing": (remove_a_shard, "WeightsMissing", "00002-of-00002.safetensors is missing"),
    "an index that points elsewhere": (leave_the_directory, "NotAModel", "outside"),
    "a layer too few": (add_layer, "WeightsMissing", r"no tensor model\.layers\.2\."),
    "rows too few": (widen, "WeightShapeMismatch", "must come from the same checkpoint"),
    "tokens too few": (
        grow_vocabulary,
        "WeightShapeMismatch",
        "must come from the same checkpoint",
    ),
    "rows too many": (forget_rows, "WeightShapeMismatch", "must come from the same checkpoint"),
}


@pytest.mark.parametrize(("damage", "reason", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(
    tmp_path: Path, damage: Any, reason: str, message: str
) -> None:
    save_tiny_llama(tmp_path)
    damage(tmp_path)
    with pytest.raises(BadModelError, match=message) as raised:
        load_decoder(tmp_path)
    assert raised.value.reason == reason


@pytest.mark.parametrize("kept_ratio", [0.999, 0.5, 0.0001, 0.00002])
def test_a_gguf_file_cut_short_is_refused(tmp_path: Path, kept_ratio: float) -> None:
    model = save_tiny_llama(tmp_path / "hf")
    path = tmp_path / "model.gguf"
    save_gguf(path, model)
    content = path.read_bytes()
    path.write_bytes(content[: max(5, int(len(content) * kept_ratio))])
    with pytest.raises(ShardTruncatedError, match="cut short"):
        load_decoder(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_gguf_header_never_gets_past_its_reader(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    whole = path.with_name("whole.gguf")
    if not whole.exists():
        save_gguf(whole, make_model(LlamaConfig(**TINY)))
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 3000))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
    except BadModelError:
        return
    assert all(0 <= t.offset + t.byte_count <= len(content) for t in header.tensors.values())


def test_a_gguf_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "model.gguf", save_tiny_llama(tmp_path / "hf"))
    with pytest.raises(WeightsMissingError, match=r"no tensor blk\.7\.attn_q\.weight"):
        GgufFile(tmp_path / "model.gguf").read("blk.7.attn_q.weight")
