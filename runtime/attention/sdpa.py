"""Paged attention with torch's own kernels: gather the pages, then attend. The reference.

What depends on lengths alone is worked out once per step and used by every layer. Decoding
sequences of similar length become one padded batch; a prefill is attended by itself.
"""

# Shapes: T packed tokens, S sequences of one plan, B blocks, C context tokens, K KV heads, G query
# heads per KV head, d head dimension.
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias, PagedBatch
from mizzen.runtime.attention.prefill import plan_prefills

# Padding a short context to the longest of its batch costs reads; a batch of its own costs calls.
# A sequence joins while the longest is at most this much longer, or both are short.
_LENGTH_RATIO = 1.5
_SHORT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Sequences with one query each that are attended together."""

    rows_S: Tensor  # into the packed tokens
    blocks_SB: Tensor
    distances_SC: Tensor  # of each key from the query: 0 is the query's own, above it nothing is
    hidden_S11C: Tensor | None  # True where the query must not look; None when it sees all


class PagedSdpa:
    """An `Attend` for one step: stores new keys and values in the cache and attends over it."""

    def __init__(self, cache: Tensor, batch: PagedBatch) -> None:
        self._cache = cache
        self._batch = batch
        self._block_tokens = cache.shape[3]
        self._starts = [0, *accumulate(batch.query_lens)]
        self._prefills = plan_prefills(batch, self._block_tokens)
        self._decodes_of: dict[int | None, list[_Decodes]] = {}

    def __call__(
        self,
        layer: int,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        *,
        bias: AttentionBias = NO_BIAS,
    ) -> Tensor:
        """Return each query's mixture over its sequence's context, itself included."""
        keys, values = self._cache[0, layer], self._cache[1, layer]
        keys.flatten(0, 1).index_copy_(0, self._batch.slots_T, k_TKd)
        values.flatten(0, 1).index_copy_(0, self._batch.slots_T, v_TKd)
        if bias.window not in self._decodes_of:
            self._decodes_of[bias.window] = self._plan_decodes(bias.window)
        decodes = self._decodes_of[bias.window]
        if len(decodes) == 1 and not self._prefills:
            return _attend_decodes(decodes[0], q_THd, keys, values, bias)
        out_THd = torch.empty_like(q_THd)
        for plan in decodes:
            q_SHd = q_THd.index_select(0, plan.rows_S)
            out_SHd = _attend_decodes(plan, q_SHd, keys, values, bias)
            out_THd.index_copy_(0, plan.rows_S, out_SHd)
        for prefill in self._prefills:
            packed = q_THd, k_TKd, v_TKd
            out_THd[prefill.rows] = prefill.attend(packed, (keys, values), bias)
        return out_THd

    def _plan_decodes(self, window: int | None) -> list[_Decodes]:
        lens = (
            self._batch.context_lens
            if window is None
            else [min(window, n) for n in self._batch.context_lens]
        )
        singles = [i for i, query_len in enumerate(self._batch.query_lens) if query_len == 1]
        groups: list[list[int]] = []
        for i in sorted(singles, key=lambda i: (-lens[i], i)):
            longest = lens[groups[-1][0]] if groups else 0
            if longest and longest <= max(lens[i] * _LENGTH_RATIO, _SHORT_TOKENS):
                groups[-1].append(i)
            else:
                groups.append([i])
        # In the packed order, a step of decodes alone needs no reordering of its rows.
        return [self._plan_decode(sorted(group), window) for group in groups]

    def _plan_decode(self, group: list[int], window: int | None) -> _Decodes:
        tables_SB, size = self._batch.block_tables_SB, self._block_tokens
        device = tables_SB.device
        lens_S1 = torch.tensor([[self._batch.context_lens[i]] for i in group], device=device)
        first_S1 = torch.zeros_like(lens_S1) if window is None else (lens_S1 - window).clamp_(min=0)
        start_S1 = first_S1 // size
        width = int((-(-lens_S1 // size) - start_S1).max())
        columns_SB = start_S1 + torch.arange(width, device=device)
        rows_S1 = torch.tensor(group, device=device)[:, None]
        at_SC = start_S1 * size + torch.arange(width * size, device=device)
        hidden_SC = (at_SC >= lens_S1) | (at_SC < first_S1)
        return _Decodes(
            rows_S=torch.tensor([self._starts[i] for i in group], device=device),
            blocks_SB=tables_SB[rows_S1, columns_SB.clamp_(max=tables_SB.shape[1] - 1)],
            distances_SC=at_SC - lens_S1 + 1,
            hidden_S11C=hidden_SC[:, None, None, :] if bool(hidden_SC.any()) else None,
        )


def _attend_decodes(
    plan: _Decodes, q_SHd: Tensor, keys: Tensor, values: Tensor, bias: AttentionBias
) -> Tensor:
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
    if bias.slopes_H is not None:
        slopes_KG1 = bias.slopes_H.view(kv_heads, -1, 1)
        scores_SKGC += slopes_KG1 * plan.distances_SC[:, None, None, :]
    if plan.hidden_S11C is not None:
        scores_SKGC.masked_fill_(plan.hidden_S11C, -torch.inf)
    weights_SKGC = scores_SKGC.softmax(dim=-1).to(q_SHd.dtype)
    return torch.matmul(weights_SKGC, gather(values).contiguous()).view(q_SHd.shape)
