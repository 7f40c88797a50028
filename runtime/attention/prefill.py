"""Sequences with many queries in a step: each is attended by itself, with torch's own kernels."""

# Shapes: T packed tokens, B blocks, C context tokens, K KV heads, H query heads, d head dimension.
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from mizzen.runtime.attention.base import AttentionBias, PagedBatch
from mizzen.runtime.attention.causal import attend_causal


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence with several queries."""

    rows: slice  # of the packed tokens
    blocks_B: Tensor
    context_len: int
    is_whole: bool  # the queries are the whole context: no page need be read

    def attend(
        self,
        packed: tuple[Tensor, Tensor, Tensor],
        pages: tuple[Tensor, Tensor],
        bias: AttentionBias,
    ) -> Tensor:
        """Return this sequence's mixtures; the pages hold its new keys and values already."""
        q_QHd, k_CKd, v_CKd = (x[self.rows] for x in packed)
        if not self.is_whole:
            k_CKd, v_CKd = (
                side.index_select(0, self.blocks_B).flatten(0, 1)[: self.context_len]
                for side in pages
            )
        return attend_causal(q_QHd, k_CKd, v_CKd, bias)


def plan_prefills(batch: PagedBatch, block_tokens: int) -> list[Prefill]:
    """Return the sequences with several queries."""
    starts = [0, *accumulate(batch.query_lens)]
    lens = zip(batch.query_lens, batch.context_lens, strict=True)
    return [
        Prefill(
            rows=slice(starts[i], starts[i + 1]),
            blocks_B=batch.block_tables_SB[i, : -(-context_len // block_tokens)],
            context_len=context_len,
            is_whole=query_len == context_len,
        )
        for i, (query_len, context_len) in enumerate(lens)
        if query_len > 1
    ]
