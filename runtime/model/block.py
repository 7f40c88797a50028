"""One layer: attention and feed-forward around the residual stream.

Attention over earlier tokens is the caller's: the engine passes paged attention, the trainer
causal attention over packed sequences.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, D model width, H query heads and K KV heads of this rank, d head width.
from typing import Protocol, cast

from torch import Tensor, nn

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias, alibi_slopes
from mizzen.runtime.kernels import ops
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.layers import (
    ACTIVATIONS,
    ColumnLinear,
    HeadNorm,
    LoraDelta,
    Norm,
    Part,
    Placement,
    RowLinear,
    sum_shares,
)
from mizzen.runtime.parallel.shard import HeadShard, Span, even_span


class Attend(Protocol):
    """Attention of one layer: stores the new keys and values, returns each query's mixture.

    Layers are counted from the first of this stage: a rank has a cache for its own alone.
    """

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return out_THd."""
        ...


class BiasedAttend(Protocol):
    """What a model with ALiBi or sliding windows needs."""

    def __call__(
        self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, *, bias: AttentionBias
    ) -> Tensor:
        """Return out_THd."""
        ...


class Attention(nn.Module):
    """Queries, keys and values, and the caller's attention; `out` leads back to model width."""

    def __init__(
        self, spec: ArchSpec, layer: int, prefix: str, heads: HeadShard, place: Placement
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, heads, spec.head_dim
        self._cached_as = layer - place.group.stages.layers(spec.layers).start

        def part(name: str, span: Span, total: int) -> Part:
            d = spec.head_dim
            return Part(name, f"self_attn.{name}", Span(span.start * d, span.size * d), total * d)

        parts = [part("q_proj", heads.queries, spec.heads)]
        parts += [part(name, heads.kv, spec.kv_heads) for name in ("k_proj", "v_proj")]
        out = part("o_proj", heads.queries, spec.heads)
        self.qkv = ColumnLinear(prefix, parts, spec.hidden_size, bias=spec.qkv_bias, place=place)
        self.out = RowLinear(prefix, out, spec.hidden_size, bias=spec.o_bias, place=place)
        self.q_norm = self.k_norm = None
        if spec.qk_norm:
            self.q_norm, self.k_norm = (
                HeadNorm(f"{prefix}self_attn.{side}_norm", spec.head_dim, spec, place=place)
                for side in "qk"
            )
        self._is_interleaved = spec.rope.is_interleaved
        self._query_scale = spec.query_scales[layer] if spec.query_scales else 1.0
        self.bias = _attention_bias(spec, layer, heads, place)

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attend: Attend,
        lora: LoraDelta | None,
    ) -> Tensor:
        """Return what this rank's heads have mixed: the input of `out`."""
        tokens, d = x_TD.shape[0], self.head_dim
        q, k, v = (part.view(tokens, -1, d) for part in self.qkv(x_TD, self.layer, lora))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = (ops.rotate(x, *tables, is_interleaved=self._is_interleaved) for x in (q, k))
        if self._query_scale != 1.0:
            q = q * self._query_scale
        if self.bias is NO_BIAS:
            mixed_THd = attend(self._cached_as, q, k, v)
        else:
            mixed_THd = cast(BiasedAttend, attend)(self._cached_as, q, k, v, bias=self.bias)
        return mixed_THd.flatten(-2)


def _attention_bias(
    spec: ArchSpec, layer: int, heads: HeadShard, place: Placement
) -> AttentionBias:
    window = spec.windows[layer] if spec.windows else None
    slopes = None
    if spec.positions == "alibi":
        # Of this rank's heads among all: slopes worked out from their own number would be others.
        slopes = alibi_slopes(spec.heads)[heads.queries.start : heads.queries.stop]
        slopes = slopes.to(place.device)
    return NO_BIAS if window is None and slopes is None else AttentionBias(slopes, window)


class FeedForward(nn.Module):
    """Up and activation; gated, the activation of a gate multiplies what is up. `down` follows."""

    def __init__(self, spec: ArchSpec, layer: int, prefix: str, place: Placement) -> None:
        super().__init__()
        self.layer = layer
        total = spec.intermediate_size
        span = even_span(total, rank=place.group.rank, size=place.group.size)
        names = ("gate_proj", "up_proj") if spec.is_gated else ("up_proj",)
        parts = [Part(name, f"mlp.{name}", span, total) for name in names]
        down = Part("down_proj", "mlp.down_proj", span, total)
        self.up = ColumnLinear(prefix, parts, spec.hidden_size, bias=spec.mlp_bias, place=place)
        self.down = RowLinear(prefix, down, spec.hidden_size, bias=spec.mlp_bias, place=place)
        self._act = spec.act

    def forward(self, x_TD: Tensor, lora: LoraDelta | None) -> Tensor:
        """Return this rank's activated units: the input of `down`."""
        match self.up(x_TD, self.layer, lora):
            case [gate, up] if self._act == "silu":
                return ops.silu_gate(gate, up)
            case [gate, up]:
                return ACTIVATIONS[self._act](gate) * up
            case [up]:
                return ACTIVATIONS[self._act](up)


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normalised copy of the stream.

    Post-norm normalises the stream after each addition instead; parallel gives both the same copy
    and needs one sum over the ranks for the two.
    """

    def __init__(self, spec: ArchSpec, layer: int, heads: HeadShard, place: Placement) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}."
        self.attention_norm = Norm(f"{prefix}input_layernorm", spec.hidden_size, spec, place=place)
        self.attention = Attention(spec, layer, prefix, heads, place)
        self.feed_forward_norm = None
        if spec.block != "parallel":
            self.feed_forward_norm = Norm(
                f"{prefix}post_attention_layernorm", spec.hidden_size, spec, place=place
            )
        self.feed_forward = FeedForward(spec, layer, prefix, place)
        self._order = spec.block
        self._group = place.group

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        attend: Attend,
        lora: LoraDelta | None,
    ) -> Tensor:
        """Return the residual stream after this layer."""
        group, attention, feed_forward = self._group, self.attention, self.feed_forward
        layer, is_post = attention.layer, self._order == "post_norm"
        inner = group.copy(x_TD if is_post else self.attention_norm(x_TD))
        mixed = attention(inner, tables, attend, lora)
        is_parallel = self._order == "parallel"
        if is_parallel and group.size > 1:
            hidden = feed_forward(inner, lora)
            share = attention.out(mixed, layer, lora) + feed_forward.down(hidden, layer, lora)
            return x_TD + sum_shares(group, share, attention.out, feed_forward.down)
        x_TD = attention.out(mixed, layer, lora, stream_TO=x_TD)
        x_TD = self.attention_norm(x_TD) if is_post else x_TD
        if not is_parallel:
            inner = group.copy(x_TD if is_post else self.feed_forward_norm(x_TD))
        x_TD = feed_forward.down(feed_forward(inner, lora), layer, lora, stream_TO=x_TD)
        return self.feed_forward_norm(x_TD) if is_post else x_TD
