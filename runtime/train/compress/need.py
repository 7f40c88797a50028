"""What a model that is computed from another one needs, from the shapes alone.

It is computed on the CPU, in float32, whatever device the trainer has. Left out are what follows
from the samples and the passing copies of one matrix, so a job may need a little more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.block import Block
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.families import family_named
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.compress.prune import is_scaled_by_layer, smaller_spec
from mizzen.runtime.train.compress.quantize import linears, quantize
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.export import check_exportable, published_dtype
from mizzen.runtime.train.options import Prune, Quantize

_FLOAT32_BYTES = 4
# Of gptq, for the matrix in hand: its Gram matrix damped, the inverse of that, and its factor.
_FACTORS = 3


@dataclass(frozen=True, slots=True)
class ComputingNeed:
    """What is in memory at once when most is, in bytes."""

    weights: int  # the base's
    beside: int  # the result as it is written, or what it is computed with if that is more

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.beside


def plan_computing(config: TrainConfig, spec: ArchSpec) -> ComputingNeed:
    """Return what merge, quantize or prune needs.

    Raises:
        JobConfigError: the model cannot be changed in this way, or the result not written.
    """
    check_exportable(spec)
    decoder = _shapes_of(spec)
    held = (*decoder.parameters(), *decoder.buffers())
    weights = sum(tensor.nbytes for tensor in held)
    if config.quantize is not None:
        return ComputingNeed(weights, _beside_quantize(decoder, config.quantize))
    if config.prune is not None:
        return ComputingNeed(weights, _beside_prune(decoder, config.prune))
    return ComputingNeed(weights, _published_bytes(_sizes(decoder), spec))


def _beside_quantize(decoder: Decoder, rules: Quantize) -> int:
    # Both algorithms store the same; this one needs no samples.
    candidate = quantize(decoder, rules.model_copy(update={"algorithm": "rtn"}), ())
    packed = sum(tensor.nbytes for tensor in candidate.packed.values())
    rest = {name: tensor.numel() for name, tensor in candidate.weights.items()}
    written = packed + _published_bytes(rest, decoder.spec)
    if rules.algorithm == "rtn":
        return written
    block = decoder.blocks[-1]  # when all but the last layer is packed
    assert isinstance(block, Block)
    grams = [linear.weight.shape[1] ** 2 * _FLOAT32_BYTES for linear in linears(block)]
    return max(written, packed + sum(grams) + _FACTORS * max(grams))


def _beside_prune(decoder: Decoder, rules: Prune) -> int:
    spec, before = decoder.spec, _sizes(decoder)
    smaller = smaller_spec(spec, rules)
    after = _sizes(_shapes_of(smaller))
    # Whole layers are left out without a copy, but for their queries where those are scaled; of
    # others, what is kept is one.
    copied = [
        size
        for name, size in after.items()
        if size != before[name] or (rules.kind == "depth" and is_scaled_by_layer(spec, name))
    ]
    return sum(copied) * _FLOAT32_BYTES + _published_bytes(after, smaller)


def _published_bytes(sizes: Mapping[str, int], spec: ArchSpec) -> int:
    """Return what float32 weights need again as they are written: what stays as it is, nothing."""
    dtype = published_dtype(spec)
    names = family_named(spec.family).names
    is_turned = dtype != torch.float32
    copied = [size for name, size in sizes.items() if is_turned or names.is_rearranged(name)]
    return sum(copied) * dtype.itemsize


def _shapes_of(spec: ArchSpec) -> Decoder:
    return Decoder(spec, Placement(torch.float32, torch.device("meta"), RankGroup()))


def _sizes(decoder: Decoder) -> dict[str, int]:
    return {shard.name: shard.tensor.numel() for shard in decoder.shards()}
