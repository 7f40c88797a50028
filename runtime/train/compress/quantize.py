"""Weights in 8 or 4 bits, written as compressed-tensors directories that any engine reads.

Every linear inside the layers is stored in fewer bits. Embedding, head and norms stay: each
token's score hangs on the head alone.
"""

# Shapes: O and I a matrix's outputs and inputs, G groups of inputs, T packed tokens.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mizzen.runtime.model.block import Block
from mizzen.runtime.model.compressed import METHOD, pack_words
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import ColumnLinear, RowLinear, TensorShard
from mizzen.runtime.train.compress.calibration import Flow
from mizzen.runtime.train.compress.candidate import Candidate, check_plain
from mizzen.runtime.train.compress.gptq import quantize_gptq
from mizzen.runtime.train.compress.rounding import (
    SCALE_DTYPE,
    Grid,
    scales_for,
    to_levels,
    to_weights,
)
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.options import Quantize
from mizzen.runtime.train.samples import Sample


def quantize(decoder: Decoder, rules: Quantize, samples: Sequence[Sample]) -> Candidate:
    """Return the model in fewer bits; the decoder's own weights take the rounded values.

    Raises:
        JobConfigError: the model's matrices do not divide into groups, or cannot be taken apart.
    """
    check_plain(decoder, "quantize")
    grid = grid_of(rules)
    _check_groups(decoder, grid)
    tensors: dict[str, Tensor] = {}
    if rules.algorithm == "rtn":
        for block in decoder.blocks:
            assert isinstance(block, Block)
            for linear in linears(block):
                tensors |= _compress(linear, grid, None)
    else:
        flow = Flow(decoder, samples[: rules.calibration_samples])
        for _, block in flow.layers():
            grams = _gram_matrices(flow, block)
            for linear in linears(block):
                tensors |= _compress(linear, grid, grams[linear])
    rest = {s.name: s.tensor.detach() for s in decoder.shards() if f"{s.name}_scale" not in tensors}
    return Candidate(
        spec=decoder.spec,
        tensors=rest | tensors,
        changes={"quantization_config": describe_grid(grid)},
    )


def grid_of(rules: Quantize) -> Grid:
    """Return what a scheme's weights may become."""
    if rules.scheme == "int4":
        return Grid(bits=4, group_size=rules.group_size)
    return Grid(bits=8, is_float=rules.scheme == "fp8")


def linears(block: Block) -> list[ColumnLinear | RowLinear]:
    """Return a layer's matrices, in the order in which they are used."""
    attention, feed_forward = block.attention, block.feed_forward
    return [attention.qkv, attention.out, feed_forward.up, feed_forward.down]


def matrices(linear: ColumnLinear | RowLinear) -> Iterator[TensorShard]:
    """Yield a linear's matrices by their checkpoint names, without biases."""
    return (shard for shard in linear.shards() if shard.name.endswith(".weight"))


def _check_groups(decoder: Decoder, grid: Grid) -> None:
    first = decoder.blocks[0]
    assert isinstance(first, Block)
    widths = {linear.weight.shape[1] for linear in linears(first)}
    if grid.group_size and (odd := sorted(w for w in widths if w % grid.group_size)):
        raise JobConfigError(
            f"Matrices with {odd[0]} inputs do not divide into groups of {grid.group_size}. "
            "Lower quantize.groupSize, or set quantize.scheme to int8."
        )


def _gram_matrices(flow: Flow, block: Block) -> dict[nn.Module, Tensor]:
    grams: dict[nn.Module, Tensor] = {}

    def see(linear: nn.Module, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        grams[linear] = grams.get(linear, torch.zeros(())) + x_TI.T @ x_TI

    flow.read(block, linears(block), see)
    return grams


@torch.no_grad()
def _compress(
    linear: ColumnLinear | RowLinear, grid: Grid, gram_II: Tensor | None
) -> dict[str, Tensor]:
    """Return a linear's stored tensors, and give it the weights that they stand for."""
    found: dict[str, Tensor] = {}
    for shard in matrices(linear):
        weight_OI = shard.tensor.detach().float()
        if gram_II is None:
            scale_OG = scales_for(weight_OI, grid)
            levels_OI = to_levels(weight_OI, scale_OG, grid)
        else:
            levels_OI, scale_OG = quantize_gptq(weight_OI, gram_II, grid)
        found[f"{shard.name}_scale"] = scale_OG.to(SCALE_DTYPE)
        if grid.is_float:
            found[shard.name] = levels_OI
        else:
            found[f"{shard.name}_packed"] = pack_words(levels_OI, bits=grid.bits)
            found[f"{shard.name}_shape"] = torch.tensor(weight_OI.shape)
        shard.tensor.copy_(to_weights(levels_OI, scale_OG))
    return found


def describe_grid(grid: Grid) -> dict[str, Any]:
    """Return config.json's quantization_config."""
    weights = {
        "num_bits": grid.bits,
        "type": "float" if grid.is_float else "int",
        "symmetric": True,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    layout = "float-quantized" if grid.is_float else "pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
