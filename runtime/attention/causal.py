"""Causal attention over packed sequences, for training: no cache, gradients flow."""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

# Shapes: T packed tokens, H query heads, K KV heads, d head dimension.
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class CausalAttention:
    """An `Attend` over sequences that lie one after the other and do not see each other."""

    def __init__(self, lens: Sequence[int]) -> None:
        self._lens = list(lens)

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Return each token's mixture of itself and the earlier tokens of its own sequence."""
        parts = (x.split(self._lens) for x in (q_THd, k_TKd, v_TKd))
        return torch.cat([attend_causal(q, k, v) for q, k, v in zip(*parts, strict=True)])


def attend_causal(q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
    """Plain causal attention of one sequence from its first token on."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THd, k_TKd, v_TKd))
    is_grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
    return out[0].transpose(0, 1)
