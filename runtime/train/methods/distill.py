"""Distillation: a student learns the distribution of a teacher that is asked once, in advance.

At every position the teacher's distribution is kept as some token ids drawn from it. Their
cross-entropy is an unbiased estimate of the whole distribution's; the k likeliest tokens are not,
and with a soft teacher they are worse than no teacher.

Source: Anshumann et al., 2025, "Sparse Logit Sampling" (arXiv 2503.16870).
"""

# Shapes: N scored tokens, K ids drawn at each, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.method import NotedMethod
from mizzen.runtime.train.methods.token_loss import (
    LOGIT_ROWS,
    head_loss_sum,
    hidden_states,
    token_losses_sum,
)
from mizzen.runtime.train.samples import Sample, TaughtSample
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.teacher import ServedTeacher


class Distill(NotedMethod):
    """Cross entropy to the teacher's drawn ids, mixed with that to the data's own tokens."""

    def __init__(self, around: Surroundings) -> None:
        assert around.config.distill is not None, "checked by the job's configuration"
        self._rules = around.config.distill
        self._seed = around.config.hyperparameters.seed

    def loss_sum(
        self, decoder: Decoder, items: Sequence[TaughtSample], lora: LoraDelta | None
    ) -> Tensor:
        """Return the summed loss of the items' labelled tokens."""
        batch = pack([item.sample for item in items], decoder.place.device)
        hidden_ND = hidden_states(decoder, batch, lora)[batch.source_N]
        drawn_NK = torch.from_numpy(np.concatenate([item.drawn_NK for item in items]))
        target = torch.cat([drawn_NK.to(batch.target_N), batch.target_N[:, None]], dim=1)
        return head_loss_sum(decoder, hidden_ND, target, self._rows)

    def count(
        self, decoder: Decoder, items: Sequence[TaughtSample], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss of the data's own tokens and their number."""
        batch = pack([item.sample for item in items], decoder.place.device)
        return token_losses_sum(decoder, batch, lora).item(), float(batch.labels)

    def ask(self, decoder: Decoder, items: Sequence[Sample], *, first: int) -> list[Tensor]:
        """Return the ids that the teacher draws for each item, the same ones at every try."""
        batch = pack(items, decoder.place.device)
        hidden_ND = hidden_states(decoder, batch, None)[batch.source_N]
        parts = hidden_ND.split(list(batch.label_counts))
        return [self._draw(decoder, part, first + index) for index, part in enumerate(parts)]

    def ask_served(
        self, teacher: ServedTeacher, items: Sequence[Sample], *, first: int
    ) -> list[Tensor]:
        """Return the same of a teacher that a deployment serves."""
        seeds = [self._seed_of(first + index) for index in range(len(items))]
        return teacher.draw(items, count=self._rules.samples, seeds=seeds)

    def note(self, item: Sample, answer: Tensor) -> TaughtSample:
        """Return the item with the ids drawn for it."""
        return TaughtSample(item, answer.numpy())

    def _rows(self, logits_NV: Tensor, target: Tensor) -> Tensor:
        log_probs = F.log_softmax(logits_NV, -1).gather(1, target)
        share = self._rules.data_weight
        by_teacher, by_data = log_probs[:, :-1].mean(1), log_probs[:, -1]
        return -((1 - share) * by_teacher + share * by_data).sum()

    def _seed_of(self, number: int) -> int:
        return self._seed * 1_000_003 + number

    def _draw(self, decoder: Decoder, hidden_ND: Tensor, number: int) -> Tensor:
        # On the CPU, whose generator gives the same numbers wherever the teacher runs.
        random = torch.Generator().manual_seed(self._seed_of(number))
        drawn = [
            torch.multinomial(
                decoder.logits(part).softmax(-1).cpu(),
                self._rules.samples,
                replacement=True,
                generator=random,
            )
            for part in hidden_ND.split(LOGIT_ROWS)
        ]
        return torch.cat(drawn).to(torch.int32)
