"""Supervised fine-tuning: predict the assistant's next token."""

# Shapes: T packed tokens, D model width, N scored positions, V vocabulary.
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.decoder import Attend, Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import PackedBatch

# Logits are the largest tensor of a step (49k columns of float32): this many rows live at once.
LOGIT_ROWS = 256


def token_losses_sum(decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None) -> Tensor:
    """Return the summed loss of the batch's scored tokens, differentiable.

    A sum and not a mean: who adds several batches up divides once, by all their tokens. Means of
    means would weigh the tokens of short batches more (transformers #34191).
    """
    attend = _FastOnCpu(CausalAttention(batch.lengths))
    hidden_TD = decoder(batch.token_ids_T, batch.positions_T, attend, lora)
    # Only scored positions need logits; prompts are often most of the tokens.
    hidden_ND = hidden_TD[batch.source_N]
    moving = [w for w in decoder.head.parameters() if w.requires_grad and torch.is_grad_enabled()]
    args = (decoder, batch.target_N, hidden_ND, *moving)
    loss: Tensor = _HeadLoss.apply(*args)  # type: ignore[no-untyped-call]
    return loss


class _FastOnCpu:
    """Attention of a CPU in float32: its bfloat16 kernel takes 2.5 times as long."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def __call__(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if q_THd.device.type != "cpu":
            return self._attend(layer, q_THd, k_TKd, v_TKd)
        q, k, v = (x.float() for x in (q_THd, k_TKd, v_TKd))
        return self._attend(layer, q, k, v).to(q_THd.dtype)


class _HeadLoss(torch.autograd.Function):
    """Cross entropy of the output head, a few rows at a time.

    A row's gradient is taken as soon as its loss is known, so its logits are gone before the next
    rows' are made and nothing is computed twice, as checkpointing would.
    """

    @staticmethod
    def forward(
        ctx: Any, decoder: Decoder, target_N: Tensor, hidden_ND: Tensor, *moving: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grads = [torch.zeros_like(weight) for weight in moving]
        for start in range(0, len(target_N), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            part = hidden_ND[rows].detach().requires_grad_(ctx.needs_input_grad[2])
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                loss = F.cross_entropy(decoder.logits(part), target_N[rows], reduction="sum")
            total += loss.detach()
            if loss.requires_grad:
                grad_hidden_ND[rows], *more = torch.autograd.grad(loss, [part, *moving])
                for grad, addend in zip(grads, more, strict=True):
                    grad += addend
        ctx.save_for_backward(grad_hidden_ND, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(outer[0].to(grad.dtype) * grad for grad in ctx.saved_tensors)
