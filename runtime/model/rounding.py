"""Weights rounded to few bits, whatever kernel multiplies them."""

# Shapes: I and O a linear's input and output width on this rank, N groups of G inputs.
import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny
GROUP = 32  # inputs that share an int4 scale
# How far to shrink a group's range before rounding: clipping outliers can lower the squared error.
_SHRINKS = tuple(1 - 0.04 * i for i in range(8))


def scales_for_8_bits(weight_OI: Tensor) -> Tensor:
    """Return per output the value of level 1, scales_O1, with which its largest weight is 127."""
    return weight_OI.abs().amax(1, keepdim=True).clamp_(min=TINY) / 127


def round_to_8_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return each weight's level from -127 to 127, and per output its scale, scales_O1."""
    scales_O1 = scales_for_8_bits(weight_OI)
    return levels_of_8_bits(weight_OI, scales_O1), scales_O1


def levels_of_8_bits(weight_OI: Tensor, scales_O1: Tensor) -> Tensor:
    """Return each weight's level from -127 to 127."""
    return (weight_OI / scales_O1).round_().to(torch.int8)


def round_to_4_bits(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return each weight's level from 0 to 15, and per group its scale and the value of level 8."""
    groups_ONG = weight_OI.unflatten(1, (-1, GROUP))
    low, high = groups_ONG.amin(-1, keepdim=True), groups_ONG.amax(-1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    scale, middle = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        step = ((high - low) * shrink / 15).clamp(min=1e-8)
        eight = (high + low) / 2 + step / 2
        rounded = _levels(groups_ONG, step, eight).sub_(8).mul_(step).add_(eight)
        error = (rounded - groups_ONG).square_().sum(-1, keepdim=True)
        is_better = error < best
        best = torch.where(is_better, error, best)
        scale, middle = torch.where(is_better, step, scale), torch.where(is_better, eight, middle)
    levels_OI = _levels(groups_ONG, scale, middle).flatten(1).to(torch.int32)
    return levels_OI, torch.cat((scale, middle), -1).transpose(0, 1).contiguous()


def _levels(groups_ONG: Tensor, scale: Tensor, middle: Tensor) -> Tensor:
    return ((groups_ONG - middle) / scale + 8).round_().clamp_(0, 15)
