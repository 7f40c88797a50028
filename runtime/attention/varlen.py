"""Prompts that are computed whole go to torch's variable-length attention, all else to our kernel.

A whole prompt's keys are the step's own, so no page is read. Where pages are read torch's kernel
is of no use: it wants 256 tokens in each, and a prefix cache wants few.

Source: torch.nn.attention.varlen (torch 2.13), which calls FlashAttention-2 (Dao, 2023).
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, of which W belong to whole prompts and the other R do not; S whole
# prompts; H query heads and K KV heads of this rank, d head dimension.
from itertools import accumulate

import torch
from torch import Tensor

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias, PagedBatch
from mizzen.runtime.attention.triton_paged import PagedTriton

_CAUSAL = (-1, 0)  # every earlier token, none of the later ones


class VarlenPrompts:
    """An `Attend` for one step: stores new keys and values in the cache and attends over it."""

    def __init__(self, cache: Tensor, batch: PagedBatch) -> None:
        self._cache = cache
        self._all = PagedTriton(cache, batch)
        pairs = list(enumerate(zip(batch.query_lens, batch.context_lens, strict=True)))
        whole = [i for i, (query_len, context_len) in pairs if 1 < query_len == context_len]
        self._has_whole = bool(whole)
        if not whole:
            return
        rest = sorted(set(range(len(pairs))) - set(whole))
        self._whole_W, self._rest_R = _tokens_of(batch, whole), _tokens_of(batch, rest)
        self._slots_W = batch.slots_T[self._whole_W]
        self._rest = PagedTriton(cache, _part(batch, rest, self._rest_R)) if rest else None
        lens = [batch.query_lens[i] for i in whole]
        self._longest = max(lens)
        ends = [0, *accumulate(lens)]
        self._ends_S = torch.tensor(ends, dtype=torch.int32, device=batch.slots_T.device)

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
        if not self._has_whole or bias is not NO_BIAS:
            return self._all(layer, q_THd, k_TKd, v_TKd, bias=bias)
        if self._rest is None:
            return self._attend_whole(layer, q_THd, k_TKd, v_TKd)
        out_THd = torch.empty_like(q_THd)
        for rows, attend in ((self._whole_W, self._attend_whole), (self._rest_R, self._rest)):
            out_THd[rows] = attend(layer, q_THd[rows], k_TKd[rows], v_TKd[rows])
        return out_THd

    def _attend_whole(self, layer: int, q_WHd: Tensor, k_WKd: Tensor, v_WKd: Tensor) -> Tensor:
        for side, new_WKd in zip(self._cache, (k_WKd, v_WKd), strict=True):
            side[layer].flatten(0, 1).index_copy_(0, self._slots_W, new_WKd)
        # Imported here: an older torch lacks it, and then nobody comes here.
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

        return varlen_attn(
            q_WHd,
            k_WKd,
            v_WKd,
            self._ends_S,
            self._ends_S,
            self._longest,
            self._longest,
            window_size=_CAUSAL,
            enable_gqa=q_WHd.shape[1] != k_WKd.shape[1],
        )


def _tokens_of(batch: PagedBatch, sequences: list[int]) -> Tensor:
    starts = [0, *accumulate(batch.query_lens)]
    tokens = [token for i in sequences for token in range(starts[i], starts[i + 1])]
    return torch.tensor(tokens, dtype=torch.int64, device=batch.slots_T.device)


def _part(batch: PagedBatch, sequences: list[int], tokens_R: Tensor) -> PagedBatch:
    tables_SB = batch.block_tables_SB
    return PagedBatch(
        query_lens=[batch.query_lens[i] for i in sequences],
        context_lens=[batch.context_lens[i] for i in sequences],
        block_tables_SB=tables_SB[torch.tensor(sequences, device=tables_SB.device)],
        slots_T=batch.slots_T[tokens_R],
    )
