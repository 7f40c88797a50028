"""Numbers in fewer bits: levels and scales by rounding to the nearest. Pure.

Integers are symmetric: zero stays zero, and a scale is all that a group of weights needs.
"""

# Shapes: O and I a matrix's outputs and inputs, G groups of inputs.
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_TINY = 1e-30
SCALE_DTYPE = torch.bfloat16
# How far to shrink a group's range before rounding: clipping outliers can lower the squared error.
_SHRINKS = tuple(1 - 0.05 * i for i in range(8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What a weight may become: `bits` wide integers or fp8, with a scale per group of inputs."""

    bits: int
    is_float: bool = False
    group_size: int | None = None  # None: one scale for each output

    @property
    def half(self) -> int:
        """How many levels lie below zero."""
        return int(2 ** (self.bits - 1))

    def width(self, inputs: int) -> int:
        """Return how many inputs share a scale."""
        return self.group_size or inputs


def scales_for(weight_OI: Tensor, grid: Grid) -> Tensor:
    """Return scale_OG, rounded as it will be stored; integers take the best of some."""
    groups_OGW = weight_OI.unflatten(1, (-1, grid.width(weight_OI.shape[1])))
    top_OG = groups_OGW.abs().amax(-1).clamp_(min=_TINY)
    if grid.is_float:
        return _as_stored(top_OG / _FP8_MAX)
    best, scale_OG = torch.full_like(top_OG, torch.inf), top_OG
    for shrink in _SHRINKS:
        candidate = _as_stored(top_OG * shrink / (grid.half - 0.5))
        step = candidate[..., None]
        rounded = (groups_OGW / step).round_().clamp_(-grid.half, grid.half - 1) * step
        error = (rounded - groups_OGW).square_().sum(-1)
        scale_OG = torch.where(error < best, candidate, scale_OG)
        best = torch.minimum(best, error)
    return scale_OG


def _as_stored(scale_OG: Tensor) -> Tensor:
    return scale_OG.to(SCALE_DTYPE).float()


def to_levels(weight_OI: Tensor, scale_OG: Tensor, grid: Grid) -> Tensor:
    """Return the level of each weight: int8, or fp8 where the grid is one of floats."""
    groups = weight_OI.unflatten(1, (scale_OG.shape[1], -1)) / scale_OG[..., None]
    if grid.is_float:
        return groups.clamp_(-_FP8_MAX, _FP8_MAX).flatten(1).to(torch.float8_e4m3fn)
    return groups.round_().clamp_(-grid.half, grid.half - 1).flatten(1).to(torch.int8)


def to_weights(levels_OI: Tensor, scale_OG: Tensor) -> Tensor:
    """Return the float32 weights that levels stand for."""
    groups = levels_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    return (groups * scale_OG[..., None]).flatten(1)
