"""Paged attention with torch's own kernels: gather the pages, then attend. CPU, and reference.

What depends on lengths alone is worked out once per step and used by every layer. Decoding
sequences of similar length become one padded batch; a prefill is attended by itself.
"""

# Shapes: S sequences of one plan, B blocks, C context tokens, Q query tokens, K KV heads, G query
# heads per KV head, d head dimension.
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention.base import PagedBatch
from mizzen.runtime.attention.causal import attend_causal

# Padding a short context to the longest of its batch costs reads; a batch of its own costs calls.
# A sequence joins while the longest is at most this much longer, or both are short.
_LENGTH_RATIO = 1.5
_SHORT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one query each that are attended together."""

    rows_S: Tensor  # into the packed tokens
    blocks_SB: Tensor
    padding_S11C: Tensor | None  # True where no key exists; None when every row is full


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence with several queries."""

    start: int
    stop: int
    blocks_B: Tensor
    context_len: int
    mask_QC: Tensor | None  # None when the queries are the whole context


class PagedSdpa:
    """An `Attend` for one step: stores new keys and values in the cache and attends over it."""

    def __init__(self, cache: Tensor, batch: PagedBatch) -> None:
        self._cache = cache
        self._slots_T = batch.slots_T
        self._block_tokens = cache.shape[3]
        self._decodes = self._plan_decodes(batch)
        self._prefills = self._plan_prefills(batch)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return each query's mixture over its sequence's context, itself included."""
        keys, values = self._cache[0, layer], self._cache[1, layer]
        keys.flatten(0, 1).index_copy_(0, self._slots_T, k_TKd)
        values.flatten(0, 1).index_copy_(0, self._slots_T, v_TKd)
        if len(self._decodes) == 1 and not self._prefills:
            return _attend_decodes(self._decodes[0], q_THd, keys, values)
        out_THd = torch.empty_like(q_THd)
        for decodes in self._decodes:
            q_SHd = q_THd.index_select(0, decodes.rows_S)
            out_SHd = _attend_decodes(decodes, q_SHd, keys, values)
            out_THd.index_copy_(0, decodes.rows_S, out_SHd)
        for plan in self._prefills:
            span = slice(plan.start, plan.stop)
            if plan.mask_QC is None:
                out_THd[span] = attend_causal(q_THd[span], k_TKd[span], v_TKd[span])
            else:
                out_THd[span] = _attend_prefill(plan, q_THd[span], keys, values)
        return out_THd

    def _plan_decodes(self, batch: PagedBatch) -> list[_Decodes]:
        lens = batch.context_lens
        starts = _starts(batch.query_lens)
        singles = [i for i, query_len in enumerate(batch.query_lens) if query_len == 1]
        groups: list[list[int]] = []
        for i in sorted(singles, key=lambda i: (-lens[i], i)):
            longest = lens[groups[-1][0]] if groups else 0
            if longest and longest <= max(lens[i] * _LENGTH_RATIO, _SHORT_TOKENS):
                groups[-1].append(i)
            else:
                groups.append([i])
        # In the packed order, a step of decodes alone needs no reordering of its rows.
        return [self._plan_decode(sorted(group), starts, batch) for group in groups]

    def _plan_decode(self, group: list[int], starts: list[int], batch: PagedBatch) -> _Decodes:
        device = batch.slots_T.device
        lens_S = torch.tensor([batch.context_lens[i] for i in group], device=device)
        width = -(-int(lens_S.max()) // self._block_tokens)
        columns_C = torch.arange(width * self._block_tokens, device=device)
        padding_SC = columns_C >= lens_S[:, None]
        index = torch.tensor(group, device=device)
        return _Decodes(
            rows_S=torch.tensor([starts[i] for i in group], device=device),
            blocks_SB=batch.block_tables_SB[index, :width],
            padding_S11C=padding_SC[:, None, None, :] if bool(padding_SC.any()) else None,
        )

    def _plan_prefills(self, batch: PagedBatch) -> list[_Prefill]:
        return [
            self._plan_prefill(i, start, batch)
            for i, start in enumerate(_starts(batch.query_lens))
            if batch.query_lens[i] > 1
        ]

    def _plan_prefill(self, i: int, start: int, batch: PagedBatch) -> _Prefill:
        query_len, context_len = batch.query_lens[i], batch.context_lens[i]
        mask_QC = None
        if query_len < context_len:
            ones = torch.ones(query_len, context_len, dtype=torch.bool, device=batch.slots_T.device)
            mask_QC = ones.tril(context_len - query_len)
        return _Prefill(
            start=start,
            stop=start + query_len,
            blocks_B=batch.block_tables_SB[i, : -(-context_len // self._block_tokens)],
            context_len=context_len,
            mask_QC=mask_QC,
        )


def _starts(query_lens: Sequence[int]) -> list[int]:
    return [0, *accumulate(query_lens)][:-1]


def _attend_decodes(plan: _Decodes, q_SHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    count, width = plan.blocks_SB.shape
    kv_heads, head_dim = keys.shape[-2:]

    def gather(side: Tensor) -> Tensor:
        pages = side.index_select(0, plan.blocks_SB.flatten())
        return pages.view(count, width * side.shape[1], kv_heads, head_dim).transpose(1, 2)

    # The query heads of a KV group stand where queries stand: each key is then read once per
    # group, and no kernel needs to repeat it. For so few queries, two plain products on keys laid
    # out head by head take a third of the time of torch's fused kernel on a CPU.
    q_SKGd = q_SHd.view(count, kv_heads, -1, head_dim)
    scores_SKGC = torch.matmul(q_SKGd, gather(keys).contiguous().transpose(-1, -2)).float()
    scores_SKGC *= head_dim**-0.5
    if plan.padding_S11C is not None:
        scores_SKGC.masked_fill_(plan.padding_S11C, -torch.inf)
    weights_SKGC = scores_SKGC.softmax(dim=-1).to(q_SHd.dtype)
    return torch.matmul(weights_SKGC, gather(values).contiguous()).view(q_SHd.shape)


def _attend_prefill(plan: _Prefill, q_QHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    def gather(side: Tensor) -> Tensor:
        pages_CKd = side.index_select(0, plan.blocks_B).flatten(0, 1)[: plan.context_len]
        return pages_CKd.transpose(0, 1)[None]

    q = q_QHd.transpose(0, 1)[None]
    is_grouped = q_QHd.shape[1] != keys.shape[-2]
    out = F.scaled_dot_product_attention(
        q, gather(keys), gather(values), attn_mask=plan.mask_QC, enable_gqa=is_grouped
    )
    return out[0].transpose(0, 1)
