"""Gradients through weights that are packed for serving, for an adapter that learns beside them.

Forwards the serving kernel multiplies. Backwards one matrix at a time is laid out again as it was:
that costs its size in memory for as long as it multiplies, and never a second model. Weights that
were rounded to few bits are not what they were, so nothing learns beside those.
"""

# torch leaves autograd's calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, B some of O.
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mizzen.runtime.model.packed import OneDnnWeight, PackedWeight, knows_bfloat16
from mizzen.runtime.model.panels import PanelWeight

Recoverable = OneDnnWeight | PanelWeight

_BLOCK = 1024  # outputs whose weights are widened at once


def is_recoverable(packed: PackedWeight) -> TypeGuard[Recoverable]:
    """Can the weight be laid out again as it was?"""
    if isinstance(packed, PanelWeight):
        return not packed.has_8_bits
    return isinstance(packed, OneDnnWeight)


def multiply_beside(x_TI: Tensor, bias_O: Tensor | None, packed: Recoverable) -> Tensor:
    """Return out_TO, differentiable by `x`."""
    return _Product.apply(x_TI, bias_O, packed)


class _Product(torch.autograd.Function):
    """Keeps nothing between the two ways but the packed weight itself."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, bias_O: Tensor | None, packed: Recoverable) -> Tensor:
        ctx.packed = packed
        return packed(x_TI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,) = grads
        return _multiply_back(grad_TO, ctx.packed.recover()), None, None


def _multiply_back(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """Return grad_TI, in the type of the outputs' gradient."""
    if weight_OI.dtype != torch.bfloat16 or knows_bfloat16():
        return grad_TO @ weight_OI.to(grad_TO.dtype)
    # Here torch would multiply bfloat16 without vectors, 40 times slower than float32. A block at a
    # time, for the whole weight would be twice as large again in this type.
    grad_TI = weight_OI.new_zeros(len(grad_TO), weight_OI.shape[1], dtype=torch.float32)
    blocks = zip(grad_TO.split(_BLOCK, dim=1), weight_OI.split(_BLOCK), strict=True)
    for grad_TB, weight_BI in blocks:
        grad_TI.addmm_(grad_TB.float(), weight_BI.float())
    return grad_TI.to(grad_TO.dtype)
