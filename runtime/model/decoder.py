"""The one decoder. It computes hidden states of packed tokens and knows nothing of caches.

Attention over earlier tokens is the caller's: the engine passes paged attention, the trainer
causal attention over packed sequences.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, D model width, H query heads and K KV heads of this rank, d head
# dimension, N chosen positions, V vocabulary.
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.layers import (
    ACTIVATIONS,
    ColumnLinear,
    Linear,
    LoraDelta,
    Part,
    Placement,
    RmsNorm,
    RowLinear,
    TensorShard,
    VocabTable,
    can_pack,
)
from mizzen.runtime.model.rope import inverse_frequencies, rope_tables, rotate
from mizzen.runtime.parallel.shard import HeadShard, Span, even_span, head_shard


class Attend(Protocol):
    """Attention of one layer: stores the new keys and values, returns each query's mixture."""

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return out_THd."""
        ...


class Attention(nn.Module):
    """Queries, keys and values, the caller's attention, and the way back to model width."""

    def __init__(
        self, spec: ArchSpec, layer: int, prefix: str, heads: HeadShard, place: Placement
    ) -> None:
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, heads, spec.head_dim

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
            names = [f"{prefix}self_attn.{side}_norm.weight" for side in "qk"]
            self.q_norm, self.k_norm = (
                RmsNorm(name, spec.head_dim, spec.norm_eps, place=place) for name in names
            )

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
        lora: LoraDelta | None,
    ) -> Tensor:
        """Return the block's addition to the residual stream."""
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x_TD, self.layer, lora)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *tables), rotate(k, *tables)
        mixed_THd = attend(self.layer, q, k, v)
        return self.out(mixed_THd.flatten(-2), self.layer, lora)


class FeedForward(nn.Module):
    """The gated block: activation(gate) times up, and down again."""

    def __init__(self, spec: ArchSpec, layer: int, prefix: str, place: Placement) -> None:
        super().__init__()
        self.layer = layer
        total = spec.intermediate_size
        span = even_span(total, rank=place.group.rank, size=place.group.size)
        parts = [Part(name, f"mlp.{name}", span, total) for name in ("gate_proj", "up_proj")]
        down = Part("down_proj", "mlp.down_proj", span, total)
        self.gate_up = ColumnLinear(
            prefix, parts, spec.hidden_size, bias=spec.mlp_bias, place=place
        )
        self.down = RowLinear(prefix, down, spec.hidden_size, bias=spec.mlp_bias, place=place)
        self.activation = ACTIVATIONS[spec.act]

    def forward(self, x_TD: Tensor, lora: LoraDelta | None) -> Tensor:
        """Return the block's addition to the residual stream."""
        gate, up = self.gate_up(x_TD, self.layer, lora)
        return self.down(self.activation(gate) * up, self.layer, lora)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on a normalised copy of the stream."""

    def __init__(self, spec: ArchSpec, layer: int, heads: HeadShard, place: Placement) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}."

        def norm(name: str) -> RmsNorm:
            return RmsNorm(f"{prefix}{name}.weight", spec.hidden_size, spec.norm_eps, place=place)

        self.attention_norm = norm("input_layernorm")
        self.attention = Attention(spec, layer, prefix, heads, place)
        self.feed_forward_norm = norm("post_attention_layernorm")
        self.feed_forward = FeedForward(spec, layer, prefix, place)
        self._group = place.group

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor],
        attend: Attend,
        lora: LoraDelta | None,
    ) -> Tensor:
        """Return the residual stream after this layer."""
        inner = self._group.copy(self.attention_norm(x_TD))
        x_TD = x_TD + self.attention(inner, tables, attend, lora)
        inner = self._group.copy(self.feed_forward_norm(x_TD))
        return x_TD + self.feed_forward(inner, lora)


class Decoder(nn.Module):
    """This rank's part of the model. Weights are unset until a loader fills `shards()`."""

    def __init__(self, spec: ArchSpec, place: Placement) -> None:
        super().__init__()
        group = place.group
        self.spec = spec
        self.place = place
        self.group = group
        self.heads = head_shard(
            heads=spec.heads, kv_heads=spec.kv_heads, rank=group.rank, size=group.size
        )
        width = spec.hidden_size
        self.embedding = VocabTable(
            "model.embed_tokens.weight", spec.vocab_size, width, place=place
        )
        self.blocks = nn.ModuleList(
            Block(spec, layer, self.heads, place) for layer in range(spec.layers)
        )
        self.norm = RmsNorm("model.norm.weight", width, spec.norm_eps, place=place)
        self.head = (
            self.embedding
            if spec.tied
            else VocabTable("lm_head.weight", spec.vocab_size, width, place=place)
        )
        # No buffer: `decoder.to(dtype)` must not round angles.
        self._rope_speeds = inverse_frequencies(spec.rope, spec.head_dim).to(place.device)

    def forward(
        self,
        token_ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        lora: LoraDelta | None = None,
    ) -> Tensor:
        """Return hidden_TD after the final norm, equal on every rank."""
        x_TD = self.embedding.embed(token_ids_T)
        tables = rope_tables(positions_T, self._rope_speeds, x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, tables, attend, lora)
        return self.norm(x_TD)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Return float32 logits_NV over the whole vocabulary, equal on every rank."""
        return self.head.logits(hidden_ND)

    def shards(self) -> Iterator[TensorShard]:
        """Yield views of every held part of a checkpoint tensor, each name once.

        Loaders copy into them; on a group of one rank they are the whole checkpoint, in its own
        names, so a trainer saves them as they are.
        """
        for module in self.modules():
            if isinstance(module, (ColumnLinear, RowLinear, VocabTable, RmsNorm)):
                yield from module.shards()

    def prepack(self) -> bool:
        """Make a CPU model faster and final: it cannot be trained or reloaded afterwards.

        Returns whether this device and torch can do it; nothing has changed if not.
        """
        if not can_pack(self.place):
            return False
        for module in self.modules():
            if isinstance(module, Linear) and (module is not self.embedding or self.spec.tied):
                module.pack(keep_weight=module is self.embedding)
        return True
