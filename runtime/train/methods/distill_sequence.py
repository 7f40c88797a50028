"""Sequence-level distillation: the teacher answers the data's prompts, and the student learns that.

One text stands for the teacher's whole distribution over texts, so it should be a likely one: each
of its tokens is the likeliest.

Source: Kim and Rush, 2016 (arXiv 1606.07947), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.generate import Drawing, draw_answers, drawn_at_once
from mizzen.runtime.train.methods.method import NotedMethod
from mizzen.runtime.train.methods.token_loss import token_losses_sum
from mizzen.runtime.train.samples import Sample, joined, prompt_of
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class AnsweredSample:
    """A sample as it was read, and the same prompt with the teacher's answer."""

    own: Sample
    taught: Sample

    def __len__(self) -> int:
        return len(self.taught)

    @property
    def labels(self) -> int:
        """Number of the teacher's tokens."""
        return self.taught.labels


class SequenceDistill(NotedMethod):
    """Cross entropy to the teacher's texts; the data's own answers are for the gate alone."""

    draws = True

    def __init__(self, around: Surroundings) -> None:
        rules, processing = around.config.distill, around.config.processing
        assert rules is not None, "checked by the job's configuration"
        self._longest = min(processing.max_seq_len, around.spec.max_len)
        self._drawing = Drawing(
            max_new_tokens=rules.max_new_tokens,
            temperature=0.0,
            eos_ids=around.tokenizer.eos_token_ids,
            at_once=drawn_at_once(around.draw_at_most),
        )

    def loss_sum(
        self, decoder: Decoder, items: Sequence[AnsweredSample], lora: LoraDelta | None
    ) -> Tensor:
        """Return the summed loss of the teacher's tokens."""
        batch = pack([item.taught for item in items], decoder.place.device)
        return token_losses_sum(decoder, batch, lora)

    def count(
        self, decoder: Decoder, items: Sequence[AnsweredSample], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss of the data's own tokens and their number."""
        batch = pack([item.own for item in items], decoder.place.device)
        return token_losses_sum(decoder, batch, lora).item(), float(batch.labels)

    def ask(self, decoder: Decoder, items: Sequence[Sample], *, first: int) -> list[Tensor]:
        """Return the teacher's answer to each item's prompt."""
        prompts = [prompt_of(item) for item in items]
        # Whoever asks a job to stop while it takes notes ends the process.
        answers = draw_answers(decoder, prompts, None, self._drawing, seed=0, stop=StopFlag())
        return [torch.tensor(answer, dtype=torch.int32) for answer in answers]

    def note(self, item: Sample, answer: Tensor) -> AnsweredSample:
        """Return the item with the answer beside, cut where the student's sequences end."""
        whole = joined(prompt_of(item), answer.tolist())
        end = self._longest
        return AnsweredSample(item, Sample(whole.token_ids_T[:end], whole.is_label_T[:end]))
