"""Causal attention of packed sequences by our own kernel, with gradients: training on a CPU.

torch's attention of a CPU takes one sequence at a time, at a quarter of the speed of its products.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-untyped-call"

# Shapes: T packed tokens, H query heads, K KV heads, d head dimension, w the same in whole vectors.
from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mizzen.runtime.attention.base import AttentionBias
from mizzen.runtime.kernels import library

_VECTOR = 16  # numbers of the longest
_KEPT = ("q", "k", "v", "out", "log_totals")  # for the way back, as the kernel names them


def is_for(q_THd: Tensor) -> bool:
    """Does the kernel attend from such queries?"""
    is_plain = q_THd.device.type == "cpu" and q_THd.dtype == torch.float32
    return is_plain and library.kernels() is not None


def attend_packed(
    q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lens: Sequence[int], bias: AttentionBias
) -> Tensor:
    """Return each token's mixture, differentiable; `is_for` must hold."""
    out_THd: Tensor = _Attend.apply(q_THd, k_TKd, v_TKd, lens, bias)
    return out_THd


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        lens: Sequence[int],
        bias: AttentionBias,
    ) -> Tensor:
        ctx.lens, ctx.bias, ctx.dim = lens, bias, q_THd.shape[2]
        q_HTw, k_KTw, v_KTw = map(_by_head, (q_THd, k_TKd, v_TKd))
        out_HTw, log_totals_HT = torch.empty_like(q_HTw), torch.empty(q_HTw.shape[:2])
        kept = (q_HTw, k_KTw, v_KTw, out_HTw, log_totals_HT)
        ctx.save_for_backward(*kept)
        _call("causal_attention", dict(zip(_KEPT, kept, strict=True)), lens, bias, ctx.dim)
        return _by_token(out_HTw, ctx.dim)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        q_HTw, k_KTw, *_ = kept = ctx.saved_tensors
        d_q_HTw, d_k_HTw, d_v_HTw = (torch.zeros_like(q_HTw) for _ in range(3))
        tensors = dict(zip(_KEPT, kept, strict=True))
        tensors |= {"d_out": _by_head(given[0]), "d_q": d_q_HTw, "d_k": d_k_HTw, "d_v": d_v_HTw}
        _call("causal_attention_gradients", tensors, ctx.lens, ctx.bias, ctx.dim)
        kv_heads = len(k_KTw)
        if kv_heads < len(q_HTw):
            d_k_HTw, d_v_HTw = (x.unflatten(0, (kv_heads, -1)).sum(1) for x in (d_k_HTw, d_v_HTw))
        return *(_by_token(x, ctx.dim) for x in (d_q_HTw, d_k_HTw, d_v_HTw)), None, None


def _by_head(x_THd: Tensor) -> Tensor:
    """Return x_HTw: each head's rows as vectors for the processor, filled up with zeros."""
    tokens, heads, dim = x_THd.shape
    width = -(-dim // _VECTOR) * _VECTOR
    x_HTw = (torch.empty if width == dim else torch.zeros)(heads, tokens, width)
    x_HTw[..., :dim] = x_THd.transpose(0, 1)
    return x_HTw


def _by_token(x_HTw: Tensor, dim: int) -> Tensor:
    return x_HTw[..., :dim].transpose(0, 1)


def _call(
    name: str, tensors: dict[str, Tensor], lens: Sequence[int], bias: AttentionBias, dim: int
) -> None:
    kernels = library.kernels()
    assert kernels is not None, "`is_for` has asked"
    heads, tokens, width = tensors["q"].shape
    ends = torch.tensor(list(accumulate(lens)))
    call = library.CausalAttention(
        **{tensor: x.data_ptr() for tensor, x in tensors.items()},
        ends=ends.data_ptr(),
        slopes=None if bias.slopes_H is None else bias.slopes_H.data_ptr(),
        sequences=len(lens),
        tokens=tokens,
        heads=heads,
        kv_heads=len(tensors["k"]),
        width=width,
        window=bias.window or 0,
        scale=dim**-0.5,
    )
    getattr(kernels, name)(byref(call), torch.get_num_threads())
