"""Linear layers' weights in the forms that kernels want: faster, and smaller if quantized.

The kernels for CPUs are torch's, those for GPUs stand beside. Norms, biases, positions and the
table of token vectors stay as they are.
"""

# torch leaves these operators untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, I and O a linear's input and output width on this rank.
import warnings
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.kernels import library
from mizzen.runtime.model.panels import PanelWeight
from mizzen.runtime.model.rounding import GROUP, TINY, round_to_4_bits, scales_for_8_bits

Quantization = Literal["none", "int8", "int4", "fp8"]

_INT4_OUTPUTS = 16  # the int4 kernel's outputs come in such blocks


class PackedWeight(Protocol):
    """A weight that multiplies."""

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO in the type of `x`."""
        ...


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Is there a faster form for weights of this type that are not quantized?"""
    if device.type != "cpu":
        return False
    return OneDnnWeight.suits(dtype) or (dtype == torch.bfloat16 and library.has_linear())


class OneDnnWeight:
    """The weight as it was, reordered as oneDNN wants it: up to 2x for few tokens."""

    @staticmethod
    def suits(dtype: torch.dtype) -> bool:
        """Is the operator (a private one of torch) here, and does it know the type?

        Without AVX-512 or AVX-NE-CONVERT oneDNN has nothing for bfloat16.
        """
        return (
            torch.backends.mkldnn.is_available()
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise")
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and knows_bfloat16()))
        )

    def __init__(self, weight_OI: Tensor) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), None)

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        return torch.ops.mkldnn._linear_pointwise(x_TI, self._packed, bias_O, "none", [], "")

    def recover(self) -> Tensor:
        """Return the weight_OI as it was."""
        return self._packed.to_dense()


def knows_bfloat16() -> bool:
    """Has the processor an instruction by which torch multiplies bfloat16?"""
    knows = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return knows is not None and knows()


class Int8Weight:
    """8 bits per weight, one scale per output; inputs are rounded to 8 bits on the way in.

    torch's kernels for 8-bit weights and 16-bit inputs are slower than bfloat16 for more than one
    token; rounding the inputs too makes the products integer ones, which CPUs are fast at.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        weight = weight_OI.detach().float()
        scales_O = scales_for_8_bits(weight).flatten()
        zeros_O = torch.zeros_like(scales_O, dtype=torch.int64)
        with warnings.catch_warnings():
            # The tensor type is on its way out, not the kernel, and it is the way to the kernel.
            warnings.simplefilter("ignore")
            whole = torch.quantize_per_channel(weight, scales_O.double(), zeros_O, 0, torch.qint8)
            self._packed: Any = torch.ops.quantized.linear_prepack(whole, None)
        # Without VNNI the sum of two products may overflow 16 bits, unless inputs have 7.
        self._has_7_bits = not _multiplies_8_bits()

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        x = x_TI.float()
        # The kernel has one scale for all tokens, and a prompt's first token has inputs a thousand
        # times the others': each is brought to the same size first. A token that is not finite
        # becomes zeros for the kernel, which refuses NaN, and NaN again after it.
        size_T1 = x.abs().amax(-1, keepdim=True).clamp_(min=TINY)
        even = (x / size_T1).nan_to_num_(0)
        out = torch.ops.quantized.linear_dynamic(even, self._packed, self._has_7_bits)
        out.mul_(size_T1)
        return (out if bias_O is None else out.add_(bias_O)).to(x_TI.dtype)


class RoundedInputs:
    """8-bit weights in panels for inputs that are not bfloat16, and become so on the way in.

    Where integers of 8 bits cannot be multiplied by each other without loss, this keeps more of the
    inputs than the 7 bits that `Int8Weight` could.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self._panels = PanelWeight(weight_OI, has_8_bits=True)

    @staticmethod
    def suits(weight_OI: Tensor) -> bool:
        """Would inputs lose less so, and does the matrix divide into panels?"""
        return not _multiplies_8_bits() and PanelWeight.divides(weight_OI)

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        out = self._panels(x_TI.bfloat16(), None, dtype=torch.float32)
        return (out if bias_O is None else out.add_(bias_O)).to(x_TI.dtype)


def _multiplies_8_bits() -> bool:
    return torch.cpu._is_vnni_supported()


class Int4Weight:
    """4 bits per weight, a scale and a shift per group of inputs; inputs keep their 16 bits.

    Made for memory: torch's kernel reads a quarter of the bytes, but for many tokens it is slower
    than bfloat16.
    """

    @staticmethod
    def suits(weight_OI: Tensor) -> bool:
        """Does the matrix divide into groups?"""
        rows, columns = weight_OI.shape
        return rows % _INT4_OUTPUTS == 0 and columns % GROUP == 0

    def __init__(self, weight_OI: Tensor) -> None:
        levels_OI, scales_NO2 = round_to_4_bits(weight_OI.detach().float())
        self._packed = torch._convert_weight_to_int4pack_for_cpu(levels_OI, 1)
        self._scales = scales_NO2.to(weight_OI.dtype)

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        out = torch._weight_int4pack_mm_for_cpu(x_TI, self._packed, GROUP, self._scales)
        return out if bias_O is None else out + bias_O


def check_device(quantization: Quantization, device: torch.device) -> None:
    """Raise QuantizationUnsupportedError if this device cannot store weights so."""
    if quantization == "fp8":
        is_gpu = device.type == "cuda"
        check_fp8(torch.cuda.get_device_capability(device) if is_gpu else None)


def check_fp8(capability: tuple[int, int] | None) -> None:
    """Raise QuantizationUnsupportedError unless a GPU of this compute capability multiplies fp8.

    torch's kernel with a scale per row is not there for 12.0 (pytorch issue 192707).
    """
    if capability is None:
        raise QuantizationUnsupportedError(
            "The quantization fp8 needs a GPU, and the model runs on a CPU. Set it to int8."
        )
    if not (8, 9) <= capability < (12, 0):
        raise QuantizationUnsupportedError(
            "The quantization fp8 needs a GPU of compute capability 8.9 to 11 and this one has "
            f"{capability[0]}.{capability[1]}. Set it to int8, or take another GPU."
        )


def pack(weight_OI: Tensor, quantization: Quantization) -> PackedWeight | None:
    """Return the weight in the form asked for, which `check_device` has let pass.

    None where it is fastest as it is: not quantized, and of a type or a shape that no kernel here
    has a form for.

    Raises:
        QuantizationUnsupportedError: the matrix does not divide as that form needs.
    """
    if weight_OI.is_cuda:
        # Imported here: torch's builds for CPUs bring no Triton.
        from mizzen.runtime.model.packed_gpu import pack_on_gpu  # noqa: PLC0415

        return pack_on_gpu(weight_OI, quantization)
    if quantization != "int4" and PanelWeight.suits(weight_OI):
        return PanelWeight(weight_OI, has_8_bits=quantization == "int8")
    if quantization == "none":
        return OneDnnWeight(weight_OI) if OneDnnWeight.suits(weight_OI.dtype) else None
    if quantization == "int8":
        return (RoundedInputs if RoundedInputs.suits(weight_OI) else Int8Weight)(weight_OI)
    if not Int4Weight.suits(weight_OI):
        rows, columns = weight_OI.shape
        raise QuantizationUnsupportedError(
            f"A matrix with {columns} inputs and {rows} outputs on one rank cannot be stored as "
            f"int4, which needs multiples of {GROUP} and {_INT4_OUTPUTS}. Set the quantization to "
            "int8, or change the tensor-parallel size."
        )
    return Int4Weight(weight_OI)
