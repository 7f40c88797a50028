"""Frozen weights in 8 or 4 bits that let gradients through: what an adapter is trained beside.

The kernels that serve round their inputs too, or are made for few tokens. A training step has many:
some rows of the matrix at a time are made whole, forwards and backwards, and the library
multiplies. The numbers are those that serving rounds to.

Source: QLoRA (Dettmers et al., 2023), section 3, with the runtime's own 8 and 4 bits.
"""

# torch leaves autograd's calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, G groups of
# inputs, R some of the outputs.
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model.packed import Quantization
from mizzen.runtime.model.rounding import (
    GROUP,
    levels_of_8_bits,
    round_to_4_bits,
    scales_for_8_bits,
)
from mizzen.runtime.parallel.group import RankGroup

# Weights that are whole at once: enough to multiply well, and 16 MiB of float32.
_WHOLE_WEIGHTS = 1 << 22


class StoredWeight(nn.Module, ABC):
    """A weight that multiplies and can be differentiated by its input. It has no parameter."""

    def forward(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO in the type of `x`."""
        return _Product.apply(x_TI, bias_O, self)

    @abstractmethod
    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Return these outputs' weights as numbers, rows_RI."""

    def spans(self) -> Iterator[slice]:
        """Yield the outputs that are made whole together, in order."""
        outputs, inputs = self.shape
        at_once = max(1, _WHOLE_WEIGHTS // inputs)
        for first in range(0, outputs, at_once):
            yield slice(first, min(first + at_once, outputs))

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""


class Stored8Bits(StoredWeight):
    """One scale per output, on all ranks that have some of its inputs."""

    def __init__(self, weight_OI: Tensor, sharers: RankGroup) -> None:
        super().__init__()
        weight = weight_OI.detach().float()
        scales_O1 = sharers.largest(scales_for_8_bits(weight))
        self.register_buffer("_levels_OI", levels_of_8_bits(weight, scales_O1))
        self.register_buffer("_scales_O1", scales_O1)
        self._levels_OI: Tensor
        self._scales_O1: Tensor

    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Return these outputs' weights as numbers, rows_RI."""
        return (self._levels_OI[span] * self._scales_O1[span]).to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self._levels_OI.shape
        return outputs, inputs


class Stored4Bits(StoredWeight):
    """A scale and a shift per group of inputs; a byte holds two neighbours of a row."""

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        levels_OI, scales_GO2 = round_to_4_bits(weight_OI.detach().float())
        levels = levels_OI.to(torch.uint8)
        self.register_buffer("_pairs", levels[:, 0::2] | levels[:, 1::2] << 4)
        self.register_buffer("_scales_OG2", scales_GO2.transpose(0, 1).contiguous())
        self._pairs: Tensor
        self._scales_OG2: Tensor

    def rows(self, span: slice, dtype: torch.dtype) -> Tensor:
        """Return these outputs' weights as numbers, rows_RI."""
        pairs = self._pairs[span]
        levels_RI = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1).float()
        step, eight = self._scales_OG2[span].split(1, dim=-1)
        return ((levels_RI.unflatten(1, (-1, GROUP)) - 8) * step + eight).flatten(1).to(dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, pairs = self._pairs.shape
        return outputs, 2 * pairs


def store(
    weight_OI: Tensor, quantization: Quantization, sharers: RankGroup | None = None
) -> StoredWeight:
    """Return a weight as it is stored to train beside; all `sharers` have inputs of its outputs.

    The numbers are then those of the whole matrix.

    Raises:
        QuantizationUnsupportedError: there is no such form, or the matrix does not divide as it
            needs.
    """
    if quantization == "int8":
        return Stored8Bits(weight_OI, sharers or RankGroup())
    outputs, inputs = weight_OI.shape
    if quantization != "int4" or inputs % GROUP:
        raise QuantizationUnsupportedError(
            f"A frozen matrix with {inputs} inputs and {outputs} outputs cannot be stored as "
            f"{quantization} to train beside: int4 needs inputs in multiples of {GROUP}. Set "
            "adaptation.quantization to int8."
        )
    return Stored4Bits(weight_OI)


class _Product(torch.autograd.Function):
    """Keeps nothing between the two ways but the stored weight itself."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, bias_O: Tensor | None, weight: StoredWeight) -> Tensor:
        ctx.weight = weight
        parts = [F.linear(x_TI, weight.rows(span, x_TI.dtype)) for span in weight.spans()]
        out_TO = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return out_TO if bias_O is None else out_TO.add_(bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TO,), weight = grads, ctx.weight
        if not ctx.needs_input_grad[0]:
            return None, None, None
        grad_TI = grad_TO.new_zeros((*grad_TO.shape[:-1], weight.shape[1]))
        for span in weight.spans():
            grad_TI += grad_TO[..., span] @ weight.rows(span, grad_TO.dtype)
        return grad_TI, None, None
