"""Supervised fine-tuning: predict the assistant's next token."""

# Shapes: T packed tokens, D model width, N scored positions, V vocabulary.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import PackedBatch

# Logits are the largest tensor of a step (49k columns of float32): this many rows live at once.
LOGIT_ROWS = 256


def token_losses_sum(decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None) -> Tensor:
    """Return the summed loss of the batch's scored tokens, differentiable.

    A sum and not a mean: who adds several batches up divides once, by all their tokens. Means of
    means would weigh the tokens of short batches more (transformers #34191).
    """
    attend = CausalAttention(batch.lengths)
    hidden_TD: Tensor = decoder(batch.token_ids_T, batch.positions_T, attend, lora)
    # Only scored positions need logits; prompts are often most of the tokens.
    hidden_ND = hidden_TD[batch.source_N]
    total = torch.zeros((), device=hidden_ND.device)
    for start in range(0, batch.labels, LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        total = total + checkpoint(
            _rows_loss, decoder, hidden_ND[rows], batch.target_N[rows], use_reentrant=False
        )
    return total


def _rows_loss(decoder: Decoder, rows_ND: Tensor, target_N: Tensor) -> Tensor:
    return F.cross_entropy(decoder.logits(rows_ND), target_N, reduction="sum")
