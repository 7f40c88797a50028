"""All layers of a stage as one call of our kernels.

A decode step's kernels take microseconds each and there are nine to a layer: going back to Python
between them costs a CPU as much as the smaller ones do.
"""

# Shapes: T packed tokens, D model width, d head dimension.
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from mizzen.runtime.attention.paged_cpu import PagedCpu
from mizzen.runtime.kernels import library
from mizzen.runtime.kernels.library import Layer, NormWeights, Stack
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.block import Block
from mizzen.runtime.model.layers import Linear, Norm


class LayerStack:
    """A stage's layers, their weights laid out in panels.

    It keeps addresses of the blocks' weights, which must live as long as it does and stay packed as
    they are.
    """

    def __init__(self, blocks: Sequence[Block], spec: ArchSpec) -> None:
        """Describe the blocks, which `suits` has let pass."""
        first = blocks[0]
        self._heads = first.attention.heads.queries.size
        self._projected = max(first.attention.qkv.outputs, first.feed_forward.up.outputs)
        self._mixed = first.attention.out.inputs
        self._gated = first.feed_forward.down.inputs
        self._layers = (Layer * len(blocks))(*map(_layer, blocks))
        self._eps = spec.norm_eps
        self._is_interleaved = spec.rope.is_interleaved
        self._activation = library.ACTIVATIONS[spec.act]

    @staticmethod
    def suits(blocks: Sequence[Block], spec: ArchSpec) -> bool:
        """Do the kernels know every part of these layers, which one rank holds whole?"""
        return (
            spec.block != "post_norm"
            and spec.act in library.ACTIVATIONS
            and spec.is_gated == (spec.act == "silu")
            and not (spec.qk_norm and spec.norm == "layer")  # heads' norms have no shift
            and not spec.query_scales
            and len(blocks) > 0
            and all(linear.panels is not None for block in blocks for linear in _linears(block))
        )

    def __call__(
        self, stream_TD: Tensor, tables: tuple[Tensor, Tensor] | None, attend: PagedCpu
    ) -> Tensor:
        """Return the stream after the last layer; what it was is overwritten."""
        kernels = library.kernels()
        assert kernels is not None, "`suits` has asked"
        tokens, width = stream_TD.shape
        widths = (width, self._projected, self._mixed, self._gated)
        scratch = [stream_TD.new_empty(tokens, wide) for wide in widths]
        cos, sin = tables or (None, None)
        plan, layer_bytes = attend.plan(self._heads)
        call = Stack(
            self._layers,
            plan,
            layer_bytes,
            stream_TD.data_ptr(),
            *(x.data_ptr() for x in scratch),
            None if cos is None else cos.data_ptr(),
            None if sin is None else sin.data_ptr(),
            len(self._layers),
            self._eps,
            self._is_interleaved,
            self._activation,
        )
        kernels.run_stack(byref(call), torch.get_num_threads())
        return stream_TD


def _linears(block: Block) -> tuple[Linear, Linear, Linear, Linear]:
    attention, feed_forward = block.attention, block.feed_forward
    return attention.qkv, attention.out, feed_forward.up, feed_forward.down


def _layer(block: Block) -> Layer:
    attention = block.attention
    bias = attention.bias
    qkv, out, up, down = map(_describe, _linears(block))
    # In a parallel layer the feed-forward reads what the attention does.
    second = block.feed_forward_norm
    return Layer(
        attention_norm=_norm(block.attention_norm),
        feed_forward_norm=NormWeights() if second is None else _norm(second),
        q_norm=None if attention.q_norm is None else attention.q_norm.weight.data_ptr(),
        k_norm=None if attention.k_norm is None else attention.k_norm.weight.data_ptr(),
        qkv=qkv,
        out=out,
        up=up,
        down=down,
        slopes=None if bias.slopes_H is None else bias.slopes_H.data_ptr(),
        window=bias.window or 0,
    )


def _norm(norm: Norm) -> NormWeights:
    bias = norm.bias
    return NormWeights(norm.weight.data_ptr(), None if bias is None else bias.data_ptr())


def _describe(linear: Linear) -> library.Linear:
    assert linear.panels is not None, "`suits` has asked"
    return linear.panels.describe(linear.bias)
