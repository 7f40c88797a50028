"""Weights laid out for our own kernels, in bfloat16 or rounded to 8 bits.

Intel's matrix unit (AMX) reads them so, and so do vectors, whose instruction for bfloat16
(AVX512-BF16) wants the same pairs. One layout serves a single token, where reading the weights is
all the time, and prompts.
"""

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, P panels.
from ctypes import byref

import torch
from torch import Tensor

from mizzen.runtime.kernels import library
from mizzen.runtime.kernels.library import TYPES, Linear
from mizzen.runtime.model.huge_pages import WEIGHT_PAGES
from mizzen.runtime.model.rounding import round_to_8_bits

_STEP, _PANEL, _TILE = 32, 32, 16  # inputs, outputs, and outputs of one tile, as kernels.h has


class PanelWeight:
    """A weight for bfloat16 inputs; with 8 bits it has a scale per output, and inputs keep 16."""

    def __init__(self, weight_OI: Tensor, *, has_8_bits: bool) -> None:
        weight_OI = weight_OI.detach()
        self.has_8_bits = has_8_bits
        self._scales_O: Tensor | None = None
        if has_8_bits:
            weight_OI, scales_O1 = round_to_8_bits(weight_OI.float())
            self._scales_O = scales_O1.flatten()
        self._outputs, self._inputs = weight_OI.shape
        pairs = weight_OI.view(-1, _PANEL // _TILE, _TILE, self._inputs // _STEP, _STEP // 2, 2)
        panels = pairs.permute(0, 3, 1, 4, 2, 5)
        self._panels = WEIGHT_PAGES.empty(tuple(panels.shape), panels.dtype).copy_(panels)

    def rows(self, at_T: Tensor) -> Tensor:
        """Return rows of the weight as they were, rows_TI; not with 8 bits."""
        assert not self.has_8_bits, "rows of 8 bits are not what they were"
        panels_T, within_T = at_T // _PANEL, at_T % _PANEL
        pieces = self._panels[panels_T, :, within_T // _TILE, :, within_T % _TILE]
        return pieces.reshape(len(at_T), self._inputs)

    def recover(self) -> Tensor:
        """Return the whole weight_OI as it was; not with 8 bits."""
        assert not self.has_8_bits, "8 bits are not what they were"
        pairs = self._panels.permute(0, 2, 4, 1, 3, 5)
        return pairs.reshape(self._outputs, self._inputs)

    @staticmethod
    def suits(weight_OI: Tensor) -> bool:
        """Is the kernel here for inputs of the weight's type, and does the matrix divide?"""
        return weight_OI.dtype == torch.bfloat16 and PanelWeight.divides(weight_OI)

    @staticmethod
    def divides(weight_OI: Tensor) -> bool:
        """Is the kernel here, and does the matrix divide into panels?"""
        outputs, inputs = weight_OI.shape
        is_whole = outputs % _PANEL == 0 and inputs % _STEP == 0
        return is_whole and weight_OI.device.type == "cpu" and library.has_linear()

    def __call__(
        self,
        x_TI: Tensor,
        bias_O: Tensor | None,
        residual_TO: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Return out_TO, the residual added, in bfloat16 or float32."""
        x_TI = x_TI.contiguous()
        out_TO = torch.empty((x_TI.shape[0], self._outputs), dtype=dtype)
        arguments = self.describe(bias_O)
        arguments.x, arguments.out = x_TI.data_ptr(), out_TO.data_ptr()
        arguments.residual = _address(residual_TO)
        arguments.tokens, arguments.out_type = x_TI.shape[0], TYPES[dtype]
        kernels = library.kernels()
        assert kernels is not None, "`suits` has asked"
        kernels.linear(byref(arguments), torch.get_num_threads())
        return out_TO

    def describe(self, bias_O: Tensor | None) -> Linear:
        """Return the kernel's arguments with what does not change from call to call."""
        return Linear(
            weight=self._panels.data_ptr(),
            scales=_address(self._scales_O),
            bias=_address(bias_O),
            inputs=self._inputs,
            outputs=self._outputs,
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
