"""Weights in 8 or 4 bits, written as compressed-tensors directories.

Every linear inside the layers is stored in fewer bits. Embedding, head and norms stay: each
token's score hangs on the head alone. Each of our matrices is rounded by itself; where a family
fuses some, their levels and scales are fused, which are the same for any order of outputs.
"""

# Shapes: O and I a matrix's outputs and inputs, G groups of inputs, T packed tokens.
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.block import Block
from mizzen.runtime.model.compressed import METHOD, pack_words
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.layers import ColumnLinear, Replicated, RowLinear, TensorShard
from mizzen.runtime.model.names import NameMap, to_checkpoint
from mizzen.runtime.train.compress.calibration import Flow
from mizzen.runtime.train.compress.candidate import Candidate
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

log = logging.getLogger(__name__)


def quantize(decoder: Decoder, rules: Quantize, samples: Sequence[Sample]) -> Candidate:
    """Return the model in fewer bits; the decoder's own weights take the rounded values.

    Raises:
        JobConfigError: the model's matrices do not divide into groups.
    """
    grid = grid_of(rules)
    _check_groups(decoder, grid)
    packed: dict[str, Tensor] = {}
    if rules.algorithm == "rtn":
        for block in decoder.blocks:
            assert isinstance(block, Block)
            for linear in linears(block):
                packed |= _compress(linear, grid, None, decoder.spec)
    else:
        flow = Flow(decoder, samples[: rules.calibration_samples])
        for _, block in flow.layers():
            grams = _gram_matrices(flow, block)
            for linear in linears(block):
                packed |= _compress(linear, grid, grams[linear], decoder.spec)
    names = family_named(decoder.spec.family).names
    return Candidate(
        spec=decoder.spec,
        weights={shard.name: shard.tensor.detach() for shard in _others(decoder)},
        packed=packed,
        changes={"quantization_config": describe_grid(grid, names, whole=_whole(decoder, names))},
    )


def warn_of_readers(family: str) -> None:
    """Say so where other engines may not read the result."""
    if family_named(family).names.transposed:
        log.warning(
            "transformers reads no compressed %s, as its matrices are no linear layers there: "
            "serve the result with Mizzen, or with an engine that takes them for linear ones.",
            family,
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


def _others(decoder: Decoder) -> Iterator[TensorShard]:
    """Yield what stays as it is."""
    compressed: set[str] = set()
    for block in decoder.blocks:
        assert isinstance(block, Block)
        compressed.update(shard.name for one in linears(block) for shard in matrices(one))
    return (shard for shard in decoder.shards() if shard.name not in compressed)


def _whole(decoder: Decoder, names: NameMap) -> list[str]:
    """Return the checkpoint's names of linears that stay as they are."""
    beside = (decoder.project_in, decoder.project_out)
    ours = [f"{one.name}.weight" for one in beside if isinstance(one, Replicated)]
    return ["lm_head", *(names.theirs(name).removesuffix(".weight") for name in ours)]


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
    linear: ColumnLinear | RowLinear, grid: Grid, gram_II: Tensor | None, spec: ArchSpec
) -> dict[str, Tensor]:
    """Return a linear's stored tensors, and give it the weights that they stand for."""
    levels: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for shard in matrices(linear):
        weight_OI = shard.tensor.detach().float()
        if gram_II is None:
            scale_OG = scales_for(weight_OI, grid)
            levels_OI = to_levels(weight_OI, scale_OG, grid)
        else:
            levels_OI, scale_OG = quantize_gptq(weight_OI, gram_II, grid)
        levels[shard.name], scales[shard.name] = levels_OI, scale_OG.to(SCALE_DTYPE)
        shard.tensor.copy_(to_weights(levels_OI, scale_OG))
    return _stored(levels, scales, grid, spec)


def _stored(
    levels: Mapping[str, Tensor], scales: Mapping[str, Tensor], grid: Grid, spec: ArchSpec
) -> dict[str, Tensor]:
    """Return a linear's tensors by the checkpoint's names, as `CompressedSource` reads them."""
    names = family_named(spec.family).names
    upright = replace(names, transposed=())
    fused, scale = (
        to_checkpoint(parts.items(), upright, head_dim=spec.head_dim) for parts in (levels, scales)
    )
    found: dict[str, Tensor] = {}
    for name, levels_OI in fused.items():
        found[f"{name}_scale"] = scale[name]
        if grid.is_float:
            is_turned = names.is_transposed(name)
            found[name] = levels_OI.T.contiguous() if is_turned else levels_OI
        else:
            found[f"{name}_packed"] = pack_words(levels_OI, bits=grid.bits)
            found[f"{name}_shape"] = torch.tensor(levels_OI.shape)
    return found


def describe_grid(grid: Grid, names: NameMap, *, whole: Sequence[str]) -> dict[str, Any]:
    """Return config.json's quantization_config; linears that are `whole` are not compressed."""
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
        # Without the second name transformers would make up GPT-2's weights; so it refuses them.
        "targets": ["Linear", *(["Conv1D"] if names.transposed else [])],
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
        "ignore": list(whole),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
