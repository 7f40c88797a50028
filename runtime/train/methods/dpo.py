"""Direct preference optimization: make the chosen answer likelier, beside what the base thought.

The base's opinion is asked once and noted, so no second copy of the model is kept and nothing is
computed twice over several epochs.

Source: Rafailov et al., 2023, equation 7; label smoothing as in Mitchell, 2023 (conservative DPO).
"""

# Shapes: P pairs, N scored tokens of both their versions.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack, sum_by_sample
from mizzen.runtime.train.measures import PREFERENCE_LOSS
from mizzen.runtime.train.methods.method import NotedMethod
from mizzen.runtime.train.methods.token_loss import token_log_probs
from mizzen.runtime.train.samples import Pair
from mizzen.runtime.train.surroundings import Surroundings


class Dpo(NotedMethod):
    """The sigmoid loss of the margin between two versions of an answer."""

    shape = "preference"
    measure = PREFERENCE_LOSS

    def __init__(self, around: Surroundings) -> None:
        self._rules = around.config.dpo

    def loss_sum(self, decoder: Decoder, items: Sequence[Pair], lora: LoraDelta | None) -> Tensor:
        """Return the pairs' summed loss."""
        reference_P = torch.tensor([pair.reference_margin for pair in items])
        margin_P = log_prob_margins(decoder, items, lora)
        scaled_P = self._rules.beta * (margin_P - reference_P.to(margin_P.device))
        smoothing = self._rules.label_smoothing
        loss_P = -F.logsigmoid(scaled_P) * (1 - smoothing) - F.logsigmoid(-scaled_P) * smoothing
        return loss_P.sum()

    def count(
        self, decoder: Decoder, items: Sequence[Pair], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss and the number of pairs; the base's mean is log 2."""
        return self.loss_sum(decoder, items, lora).item(), float(len(items))

    def ask(self, decoder: Decoder, items: Sequence[Pair], *, first: int) -> list[Tensor]:
        """Return the base's margin of each pair."""
        return list(log_prob_margins(decoder, items, None).cpu())

    def note(self, item: Pair, answer: Tensor) -> Pair:
        """Return the pair with the base's margin."""
        return replace(item, reference_margin=answer.item())


def log_prob_margins(decoder: Decoder, pairs: Sequence[Pair], lora: LoraDelta | None) -> Tensor:
    """Return how much likelier each chosen answer is than the rejected one, in nats."""
    versions = [version for pair in pairs for version in (pair.chosen, pair.rejected)]
    batch = pack(versions, decoder.place.device)
    log_probs = sum_by_sample(batch, token_log_probs(decoder, batch, lora))
    return log_probs[0::2] - log_probs[1::2]
