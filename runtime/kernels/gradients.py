"""Kernels with a gradient, for training on the CPU.

Between its products a layer's training step is bound by memory, and torch goes through it once for
each small operator: five times for a norm and ten for its gradient, where a kernel does once.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call, misc, no-untyped-def"

# Shapes: R rows, D width, T packed tokens, H heads, d head dimension, F inner width.
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mizzen.runtime.kernels import library, ops
from mizzen.runtime.kernels.library import TYPES

_ROWS_PER_SUM = 64  # as rows.c has it


def are_used(*tensors: Tensor) -> bool:
    """Do the kernels work on such tensors, which all have to be of one type, where one learns?"""
    first = tensors[0]
    return (
        torch.is_grad_enabled()
        and first.dtype in TYPES
        and all(x.device.type == "cpu" and x.dtype == first.dtype for x in tensors)
        and any(x.requires_grad for x in tensors)
        and library.kernels() is not None
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return what `ops.rms_norm` does."""
    return _RmsNorm.apply(x, weight, eps)


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return silu(gate) * up; both have one stride."""
    return _SiluGate.apply(gate_TF, up_TF)


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Return what `ops.rotate` does, in memory of its own."""
    return _Rotation.apply(x_THd, cos, sin, is_interleaved)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return ops.rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width = x.shape[-1]
        rows = x.numel() // width
        grad, out, sums_RD = grad.contiguous(), torch.empty_like(x), None
        if ctx.needs_input_grad[1]:
            sums_RD = torch.zeros(-(-rows // _ROWS_PER_SUM), width)
        library.kernels().norm_back(
            x.data_ptr(),
            weight.data_ptr(),
            grad.data_ptr(),
            out.data_ptr(),
            None if sums_RD is None else sums_RD.data_ptr(),
            rows,
            width,
            ctx.eps,
            TYPES[x.dtype],
            torch.get_num_threads(),
        )
        return out, None if sums_RD is None else sums_RD.sum(0).to(weight.dtype), None


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        return ops.silu_gate(gate_TF, up_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        gate_TF, up_TF = ctx.saved_tensors
        rows, width = gate_TF.shape
        grad_TF, out_T2F = grad_TF.contiguous(), grad_TF.new_empty(rows, 2 * width)
        library.kernels().silu_gate_back(
            gate_TF.data_ptr(),
            up_TF.data_ptr(),
            grad_TF.data_ptr(),
            out_T2F.data_ptr(),
            rows,
            gate_TF.stride(0),
            width,
            TYPES[gate_TF.dtype],
            torch.get_num_threads(),
        )
        gate_grad_TF, up_grad_TF = out_T2F.split(width, dim=-1)
        return gate_grad_TF, up_grad_TF


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return _turned(x_THd, cos, sin, is_interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THd: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_THd, cos, -sin, ctx.is_interleaved), None, None, None


def _turned(x_THd: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
    copy_THd = x_THd.clone(memory_format=torch.contiguous_format)
    return ops.rotate(copy_THd, cos, sin, is_interleaved=is_interleaved)
