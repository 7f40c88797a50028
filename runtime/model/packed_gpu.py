"""Linear layers' weights in few bits on a GPU.

For few tokens a step's time is that of reading the weights: a kernel reads the stored ones and
makes them whole in registers. For many tokens it is that of multiplying, and the library's kernels
do that best: the matrix is made whole in memory first. In fp8 the GPU multiplies what is stored.
"""

# Neither triton's language nor torch's calls are typed.
# mypy: disable-error-code="import-untyped, no-any-return, no-untyped-call, no-untyped-def"
# mypy: disable-error-code="untyped-decorator"

# Shapes: T packed tokens, I and O a linear's input and output width on this rank, G groups of
# inputs. In the kernel: M tokens, N outputs and C stored columns of a tile.
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model.packed import PackedWeight, Quantization
from mizzen.runtime.model.rounding import GROUP, TINY, round_to_4_bits, round_to_8_bits

_FEW_TOKENS = 64
_TOKENS, _OUTPUTS, _COLUMNS = 16, 16, 64  # of a program's tiles; 16 is the least that `dot` takes
_HALF = GROUP // 2
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_FP8_MULTIPLE = 16  # what the library's kernel wants of both widths


def pack_on_gpu(weight_OI: Tensor, quantization: Quantization) -> PackedWeight:
    """Return the weight in the form asked for.

    Raises:
        QuantizationUnsupportedError: the matrix does not divide as that form needs.
    """
    rows, columns = weight_OI.shape
    if quantization == "int8":
        return GpuInt8Weight(weight_OI)
    if quantization == "int4":
        _check(columns % GROUP == 0, "int4", rows, columns, f"inputs in multiples of {GROUP}")
        return GpuInt4Weight(weight_OI)
    fits = rows % _FP8_MULTIPLE == columns % _FP8_MULTIPLE == 0
    _check(fits, "fp8", rows, columns, f"both in multiples of {_FP8_MULTIPLE}")
    return Fp8Weight(weight_OI)


def _check(fits: bool, kind: str, rows: int, columns: int, needs: str) -> None:
    if not fits:
        raise QuantizationUnsupportedError(
            f"A matrix with {columns} inputs and {rows} outputs on one rank cannot be stored as "
            f"{kind}, which needs {needs}. Set the quantization to int8, or change the "
            "tensor-parallel size."
        )


class GpuInt8Weight:
    """8 bits per weight and one scale per output; inputs keep their type."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._stored_OI, self._scales_O1 = round_to_8_bits(weight_OI.detach().float())

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        if x_TI.shape[0] > _FEW_TOKENS:
            return F.linear(x_TI, self.whole(x_TI.dtype), bias_O)
        out_TO = _multiply(x_TI, self._stored_OI, self._scales_O1, bits=8)
        return out_TO if bias_O is None else out_TO + bias_O

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the stored weights as numbers."""
        return (self._stored_OI * self._scales_O1).to(dtype)


class GpuInt4Weight:
    """4 bits per weight, a scale and a shift per group of inputs; inputs keep their type.

    A byte holds a weight of the group's first half in its low bits and its fellow of the second
    half in its high ones, so that a tile of bytes is two tiles of weights of unbroken inputs.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        levels_OI, scales_GO2 = round_to_4_bits(weight_OI.detach().float())
        levels = levels_OI.to(torch.uint8).unflatten(1, (-1, 2, _HALF))
        self._stored_OC = (levels[:, :, 0] | levels[:, :, 1] << 4).flatten(1)
        self._scales_OG2 = scales_GO2.transpose(0, 1).contiguous()

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        if x_TI.shape[0] > _FEW_TOKENS:
            return F.linear(x_TI, self.whole(x_TI.dtype), bias_O)
        out_TO = _multiply(x_TI, self._stored_OC, self._scales_OG2, bits=4)
        return out_TO if bias_O is None else out_TO + bias_O

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Return the stored weights as numbers."""
        halves = self._stored_OC.unflatten(1, (-1, 1, _HALF))
        levels = torch.cat((halves & 15, halves >> 4), dim=2).flatten(2).float()
        step, eight = self._scales_OG2[..., :1], self._scales_OG2[..., 1:]
        return ((levels - 8) * step + eight).flatten(1).to(dtype)


class Fp8Weight:
    """8-bit floats with one scale per output; inputs become 8-bit floats with one per token."""

    def __init__(self, weight_OI: Tensor) -> None:
        self._stored_OI, self._scales_O1 = _to_fp8(weight_OI.detach())

    def __call__(self, x_TI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Return out_TO."""
        stored_TI, scales_T1 = _to_fp8(x_TI)
        # Without fast accumulation: long sums lose bits in it.
        out_TO = torch._scaled_mm(
            stored_TI,
            self._stored_OI.t(),
            scale_a=scales_T1,
            scale_b=self._scales_O1.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        ).to(x_TI.dtype)
        return out_TO if bias_O is None else out_TO + bias_O


def _to_fp8(rows_NI: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows_NI.float()
    scales_N1 = rows.abs().amax(1, keepdim=True).clamp_(min=TINY) / _FP8_MAX
    # Rounding may carry a row's largest number beyond the format's, which would become NaN.
    return (rows / scales_N1).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), scales_N1


def _multiply(x_TI: Tensor, stored: Tensor, scales: Tensor, *, bits: int) -> Tensor:
    (tokens, inputs), outputs = x_TI.shape, stored.shape[0]
    out_TO = x_TI.new_empty((tokens, outputs))
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(tokens, _TOKENS))
    _multiply_kernel[grid](
        out_TO,
        x_TI.contiguous(),
        stored,
        scales,
        tokens,
        INPUTS=inputs,
        OUTPUTS=outputs,
        COLUMNS=stored.shape[1],
        BITS=bits,
        HALF=_HALF,
        M=_TOKENS,
        N=_OUTPUTS,
        C=_COLUMNS,
    )
    return out_TO


# Compiled once per matrix shape, never for a number of tokens.
@triton.jit(do_not_specialize=["tokens"])
def _multiply_kernel(
    out,
    x,
    stored,
    scales,
    tokens,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
):
    """Write N outputs of M tokens."""
    output_N = tl.program_id(0) * N + tl.arange(0, N)
    token_M = tl.program_id(1) * M + tl.arange(0, M)
    is_output_N = output_N < OUTPUTS
    is_token_M = token_M < tokens
    stored_at_N = output_N.to(tl.int64) * COLUMNS
    x_at_M = token_M.to(tl.int64) * INPUTS
    sum_MN = tl.zeros([M, N], tl.float32)
    for start in range(0, COLUMNS, C):
        column_C = start + tl.arange(0, C)
        is_column_C = column_C < COLUMNS
        is_x_MC = is_token_M[:, None] & is_column_C[None, :]
        is_weight_NC = is_output_N[:, None] & is_column_C[None, :]
        stored_NC = tl.load(
            stored + stored_at_N[:, None] + column_C[None, :], mask=is_weight_NC, other=0
        )
        if BITS == 8:
            x_MC = tl.load(x + x_at_M[:, None] + column_C[None, :], mask=is_x_MC, other=0.0)
            weight_NC = stored_NC.to(tl.float32).to(x_MC.dtype)
            sum_MN += tl.dot(x_MC, tl.trans(weight_NC), input_precision="ieee")
        else:
            group_C = column_C // HALF
            scale_at_NC = (output_N[:, None] * (COLUMNS // HALF) + group_C[None, :]) * 2
            step_NC = tl.load(scales + scale_at_NC, mask=is_weight_NC, other=0.0)
            eight_NC = tl.load(scales + scale_at_NC + 1, mask=is_weight_NC, other=0.0)
            first_C = group_C * 2 * HALF + column_C % HALF
            for half in tl.static_range(2):
                input_C = first_C + half * HALF
                x_MC = tl.load(x + x_at_M[:, None] + input_C[None, :], mask=is_x_MC, other=0.0)
                level_NC = (stored_NC.to(tl.int32) >> (4 * half)) & 15
                weight_NC = (level_NC - 8).to(tl.float32) * step_NC + eight_NC
                sum_MN += tl.dot(x_MC, tl.trans(weight_NC.to(x_MC.dtype)), input_precision="ieee")
    if BITS == 8:
        scale_N = tl.load(scales + output_N, mask=is_output_N, other=0.0)
        sum_MN = sum_MN * scale_N[None, :]
    out_at_MN = token_M.to(tl.int64)[:, None] * OUTPUTS + output_N[None, :]
    tl.store(out + out_at_MN, sum_MN, mask=is_token_M[:, None] & is_output_N[None, :])
