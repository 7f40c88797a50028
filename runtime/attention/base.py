"""The paged KV cache, and what attention must know of one step's packed batch.

The cache is [2, layers, blocks, BLOCK, kv_heads, head_dim]; keys are [0], values [1]. Block 0 is
a dump: padded rows of a batch may write there and nobody reads it.
"""

# Shapes: S sequences in the step, T packed query tokens, B blocks in the longest block table.
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DUMP_BLOCK = 0
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class AttentionBias:
    """What a layer adds to causal attention, or hides from it."""

    slopes_H: Tensor | None = None  # ALiBi: what one token of distance costs, per query head
    window: int | None = None  # how many tokens a query sees, itself included


NO_BIAS = AttentionBias()


def alibi_slopes(heads: int) -> Tensor:
    """Return each head's slope in float32, for head counts that are no power of two as well.

    Source: ALiBi (Press et al., 2022); beyond a power of two, every other slope of the next one.
    """
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


@dataclass(frozen=True, slots=True)
class KvShape:
    """The KV cache of one rank."""

    layers: int
    blocks: int
    kv_heads: int  # this rank's: `decoder.heads.kv.size`
    head_dim: int
    block_tokens: int = BLOCK_TOKENS

    def allocate(self, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Return the zeroed cache: a padded row must find numbers there, never NaN."""
        sides = (2, self.layers, self.blocks, self.block_tokens, self.kv_heads, self.head_dim)
        return torch.zeros(sides, dtype=dtype, device=device)

    def block_bytes(self, dtype: torch.dtype) -> int:
        """Return what one block costs over all layers."""
        per_token = 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize
        return per_token * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedBatch:
    """One step's sequences, packed one after the other.

    A sequence's `context_lens` counts all its tokens whose keys exist after this step, so its
    queries are the last `query_lens` of them. Lengths live on the host: they decide shapes.
    """

    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_tables_SB: Tensor  # int64, rows padded with DUMP_BLOCK
    slots_T: Tensor  # int64: block * block_tokens + offset, where each new key goes

    @classmethod
    def build(
        cls,
        *,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        block_tokens: int = BLOCK_TOKENS,
    ) -> "PagedBatch":
        """Work out where the new keys go from each sequence's own blocks."""
        width = max((len(table) for table in block_tables), default=0)
        padded = [[*table, *[DUMP_BLOCK] * (width - len(table))] for table in block_tables]
        slots = [
            table[position // block_tokens] * block_tokens + position % block_tokens
            for query_len, context_len, table in zip(
                query_lens, context_lens, block_tables, strict=True
            )
            for position in range(context_len - query_len, context_len)
        ]
        return cls(
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables_SB=torch.tensor(padded, dtype=torch.int64, device=device),
            slots_T=torch.tensor(slots, dtype=torch.int64, device=device),
        )

    def positions_T(self) -> Tensor:
        """Return each query token's position in its own sequence."""
        spans = [
            torch.arange(context_len - query_len, context_len)
            for query_len, context_len in zip(self.query_lens, self.context_lens, strict=True)
        ]
        return torch.cat(spans).to(self.slots_T.device)
