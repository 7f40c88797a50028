"""Checkpoints in compressed-tensors' layout are read as the floats they stand for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hack.tiny_model import write_tiny_model
from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model.compressed import CompressedSource, pack_words, unpack_words
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.names import NameMap
from mizzen.runtime.model.safetensors_dir import SafetensorsDir
from mizzen.runtime.parallel.shard import Span

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_levels_with_the_lowest_bits_first(bits: int) -> None:
    half = 2 ** (bits - 1)
    levels = torch.arange(-half, half).repeat(2)[: 32 // bits * 3 - 1][None]
    words = pack_words(levels, bits=bits)
    assert words.dtype == torch.int32
    assert unpack_words(words, bits=bits)[:, : levels.shape[1]].tolist() == levels.tolist()
    first = words[0, 0].item() & (2**bits - 1)
    assert first == levels[0, 0].item() + half


def source_of(folder: Path, tensors: dict[str, torch.Tensor], *, bits: int) -> CompressedSource:
    save_file(tensors, folder / "model.safetensors")
    return CompressedSource(SafetensorsDir(folder), NameMap(), bits=bits)


def test_a_group_of_inputs_shares_a_scale(tmp_path: Path) -> None:
    levels = torch.randint(-8, 8, (6, 64))
    scale = torch.rand(6, 2)
    tensors = {
        f"{NAME}_packed": pack_words(levels, bits=4),
        f"{NAME}_scale": scale,
        f"{NAME}_shape": torch.tensor([6, 64]),
    }
    source = source_of(tmp_path, tensors, bits=4)
    wanted = levels * scale.repeat_interleave(32, dim=1)
    assert source.shape(NAME) == (6, 64)
    torch.testing.assert_close(source.read(NAME), wanted)
    torch.testing.assert_close(source.read(NAME, rows=Span(2, 3)), wanted[2:5])
    torch.testing.assert_close(source.read(NAME, columns=Span(30, 9)), wanted[:, 30:39])


LAYOUTS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "int8 by output": (torch.int8, (6, 1)),
    "fp8 by output": (torch.float8_e4m3fn, (6, 1)),
    "fp8 by matrix": (torch.float8_e4m3fn, (1,)),
}


@pytest.mark.parametrize(("dtype", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_reads_whole_numbers(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    levels = torch.randint(-20, 20, (6, 64)).to(dtype)
    scale = torch.rand(shape)
    source = source_of(tmp_path, {NAME: levels, f"{NAME}_scale": scale}, bits=8)
    wanted = levels.float() * scale.reshape(-1, 1)
    torch.testing.assert_close(source.read(NAME), wanted)
    torch.testing.assert_close(source.read(NAME, rows=Span(2, 3)), wanted[2:5])


def test_zero_points_move_the_levels(tmp_path: Path) -> None:
    levels = torch.randint(-100, 100, (6, 64), dtype=torch.int8)
    scale, zero = torch.rand(6, 1), torch.randint(-9, 9, (6, 1), dtype=torch.int8)
    tensors = {NAME: levels, f"{NAME}_scale": scale, f"{NAME}_zero_point": zero}
    found = source_of(tmp_path, tensors, bits=8).read(NAME)
    torch.testing.assert_close(found, (levels.float() - zero) * scale)


def test_tensors_that_are_not_compressed_are_read_as_they_are(tmp_path: Path) -> None:
    norm = torch.rand(64)
    source = source_of(tmp_path, {"model.norm.weight": norm}, bits=8)
    assert torch.equal(source.read("model.norm.weight"), norm)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"quant_method": "gptq"}, "quantized by gptq in format None"),
    "another layout": (
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        "in format marlin-24. Supported: compressed-tensors in pack-quantized",
    ),
    "bits we do not unpack": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 3}}},
        },
        "stores weights in [3] bits. Supported: 4, or 8",
    ),
}


@pytest.mark.parametrize(("rules", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses_to_load(tmp_path: Path, rules: dict[str, Any], text: str) -> None:
    path = write_tiny_model(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": rules}))
    with pytest.raises(QuantizationUnsupportedError) as caught:
        load_decoder(path)
    assert text in str(caught.value)
    assert load_file(path / "model.safetensors")
