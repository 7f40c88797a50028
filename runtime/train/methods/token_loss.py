"""What a decoder thinks of packed tokens: losses, log-probabilities, hidden states.

Logits are the largest tensor of a step (49k columns of float32), so a few rows live at once.
"""

# Shapes: T packed tokens, D model width, N scored positions, V vocabulary.
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mizzen.runtime.attention.base import AttentionBias
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import PackedBatch, pack
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.samples import Floats, Sample

LOGIT_ROWS = 256

# Sums the losses of some rows of logits_NV, given the same rows of what they should predict.
RowLoss = Callable[[Tensor, Tensor], Tensor]


def hidden_states(decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None) -> Tensor:
    """Return hidden_TD of samples that lie end to end and do not see each other."""
    attend = _FastOnCpu(CausalAttention(batch.lengths))
    return decoder(batch.token_ids_T, batch.positions_T, attend, lora)


def token_losses_sum(decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None) -> Tensor:
    """Return the summed loss of the batch's scored tokens, differentiable.

    A sum and not a mean: who adds several batches up divides once, by all their tokens. Means of
    means would weigh the tokens of short batches more (transformers #34191).
    """
    # Only scored positions need logits; prompts are often most of the tokens.
    hidden_ND = hidden_states(decoder, batch, lora)[batch.source_N]
    return head_loss_sum(decoder, hidden_ND, batch.target_N, cross_entropy_sum)


def cross_entropy_sum(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Return the summed loss of predicting one token from each row."""
    return F.cross_entropy(logits_NV, target_N, reduction="sum")


def head_loss_sum(decoder: Decoder, hidden_ND: Tensor, target: Tensor, row_loss: RowLoss) -> Tensor:
    """Return the summed loss of the output head, differentiable; `target` has N rows."""
    moving = [w for w in decoder.head.parameters() if w.requires_grad and torch.is_grad_enabled()]
    args = (decoder, row_loss, target, hidden_ND, *moving)
    loss: Tensor = _HeadLoss.apply(*args)  # type: ignore[no-untyped-call]
    return loss


def token_log_probs(
    decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability of each scored token, float32 and differentiable."""
    hidden_ND = hidden_states(decoder, batch, lora)[batch.source_N]
    return head_log_probs(decoder, hidden_ND, batch.target_N, temperature=temperature)


def head_log_probs(
    decoder: Decoder, hidden_ND: Tensor, target_N: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return log_probs_N of the targets. Rows' logits are made again on the way back."""

    def rows(hidden: Tensor, target: Tensor) -> Tensor:
        logits = decoder.logits(hidden) / temperature
        return -F.cross_entropy(logits, target, reduction="none")

    parts = zip(hidden_ND.split(LOGIT_ROWS), target_N.split(LOGIT_ROWS), strict=True)
    found = [
        checkpoint(rows, hidden, target, use_reentrant=False, preserve_rng_state=False)
        for hidden, target in parts
    ]
    return torch.cat(found) if found else hidden_ND.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def log_probs_by_sample(
    decoder: Decoder,
    samples: Sequence[Sample],
    lora: LoraDelta | None,
    *,
    at_once: AtOnce,
    temperature: float = 1.0,
) -> list[Floats]:
    """Return the log-probability of each sample's labels; raises as `AtOnce` where none fits."""

    def log_probs(part: Sequence[Sample], _: int) -> list[Floats]:
        batch = pack(part, decoder.place.device)
        values_N = token_log_probs(decoder, batch, lora, temperature=temperature)
        return [x.cpu().numpy() for x in values_N.split(list(batch.label_counts))]

    return at_once.in_parts(samples, log_probs, ranks=decoder.group.size)


class _FastOnCpu:
    """Attention of a CPU in float32, for our kernel; torch's in bfloat16 is 2.5 times as slow."""

    def __init__(self, attend: CausalAttention) -> None:
        self._attend = attend

    def __call__(
        self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, **bias: AttentionBias
    ) -> Tensor:
        if q_THd.device.type != "cpu":
            return self._attend(layer, q_THd, k_TKd, v_TKd, **bias)
        q, k, v = (x.float() for x in (q_THd, k_TKd, v_TKd))
        return self._attend(layer, q, k, v, **bias).to(q_THd.dtype)


class _HeadLoss(torch.autograd.Function):
    """The loss of the output head, a few rows at a time.

    A row's gradient is taken as soon as its loss is known, so its logits are gone before the next
    rows' are made and nothing is computed twice, as checkpointing would.
    """

    @staticmethod
    def forward(
        ctx: Any,
        decoder: Decoder,
        row_loss: RowLoss,
        target: Tensor,
        hidden_ND: Tensor,
        *moving: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden_ND.device)
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grads = [torch.zeros_like(weight) for weight in moving]
        for start in range(0, len(target), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            part = hidden_ND[rows].detach().requires_grad_(ctx.needs_input_grad[3])
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                loss = row_loss(decoder.logits(part), target[rows])
            total += loss.detach()
            if loss.requires_grad:
                grad_hidden_ND[rows], *more = torch.autograd.grad(loss, [part, *moving])
                for grad, addend in zip(grads, more, strict=True):
                    grad += addend
        ctx.save_for_backward(grad_hidden_ND, *grads)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        inner = (outer[0].to(grad.dtype) * grad for grad in ctx.saved_tensors)
        return None, None, None, *inner
