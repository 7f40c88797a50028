"""Causal attention of queries that are the last of their keys, and of packed sequences of them."""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, Q queries, C keys, H query heads, K KV heads, d head dimension.
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention import causal_cpu
from mizzen.runtime.attention.base import NO_BIAS, AttentionBias

# A bias makes torch hold its scores' shape in memory, so queries come in pieces of this many.
_BIASED_QUERIES = 256


class CausalAttention:
    """An `Attend` over sequences that lie one after the other, for training: no cache."""

    def __init__(self, lens: Sequence[int]) -> None:
        self._lens = list(lens)

    def __call__(
        self,
        layer: int,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        *,
        bias: AttentionBias = NO_BIAS,
    ) -> Tensor:
        """Return each token's mixture of itself and the earlier tokens of its own sequence."""
        if causal_cpu.is_for(q_THd):
            return causal_cpu.attend_packed(q_THd, k_TKd, v_TKd, self._lens, bias)
        parts = (x.split(self._lens) for x in (q_THd, k_TKd, v_TKd))
        return torch.cat([attend_causal(q, k, v, bias) for q, k, v in zip(*parts, strict=True)])


def attend_causal(
    q_QHd: Tensor, k_CKd: Tensor, v_CKd: Tensor, bias: AttentionBias = NO_BIAS
) -> Tensor:
    """Return each query's mixture; the queries are the last of the keys' tokens."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_QHd, k_CKd, v_CKd))
    queries, keys = q.shape[2], k.shape[2]
    is_grouped = q.shape[1] != k.shape[1]
    if bias is NO_BIAS:
        mask = None if queries == keys else _is_visible(queries, keys, None, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=is_grouped
        )
        return out[0].transpose(0, 1)
    pieces = []
    for start in range(0, queries, _BIASED_QUERIES):
        stop = min(start + _BIASED_QUERIES, queries)
        last = keys - queries + stop  # the keys up to the piece's last query
        first = max(0, last - (stop - start) - bias.window + 1) if bias.window else 0
        mask = _is_visible(stop - start, last - first, bias.window, q.device)
        if bias.slopes_H is not None:
            mask = _alibi(mask, bias.slopes_H).to(q.dtype)
        q_piece, k_piece, v_piece = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        out = F.scaled_dot_product_attention(
            q_piece, k_piece, v_piece, attn_mask=mask, enable_gqa=is_grouped
        )
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)


@lru_cache(maxsize=4)  # all layers of a step ask for the same
def _is_visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each of the last `queries` may see."""
    visible_QC = torch.ones(queries, keys, dtype=torch.bool, device=device)
    visible_QC = visible_QC.tril(keys - queries)
    return visible_QC if window is None else visible_QC.triu(keys - queries - window + 1)


def _alibi(visible_QC: Tensor, slopes_H: Tensor) -> Tensor:
    """Return what is added to each head's scores: the distance's cost, or minus infinity."""
    queries, keys = visible_QC.shape
    at_C = torch.arange(keys, device=visible_QC.device)
    distance_QC = at_C - at_C[keys - queries :, None]
    cost_HQC = slopes_H[:, None, None] * distance_QC
    return cost_HQC.masked_fill_(~visible_QC, -torch.inf)
