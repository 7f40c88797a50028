"""On-policy distillation: the student answers, and the teacher says how likely it finds that.

A student that learns from others' texts is never told what to make of its own mistakes. The reverse
divergence is estimated at the tokens that were drawn, so the teacher need only score those: each
token's advantage is how much likelier the teacher finds it than the student did.

Sources: Agarwal et al., 2024 (arXiv 2306.13649), section 3; Gu et al., 2024 (arXiv 2306.08543).
"""

# Shapes: N answer tokens of a batch of rollouts.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.copies import Row, share_out
from mizzen.runtime.train.device import choose_dtype
from mizzen.runtime.train.generate import Drawing, draw_answers, drawn_at_once
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.policy import concatenated, without_dropout
from mizzen.runtime.train.methods.token_loss import (
    log_probs_by_sample,
    token_log_probs,
    token_losses_sum,
)
from mizzen.runtime.train.samples import Floats, Item, Sample, joined, prompt_of
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.teacher import ServedTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """An answer of the student's, and how much likelier the teacher finds its tokens."""

    sample: Sample
    old_N: Floats  # the student's log-probabilities when it was drawn
    advantage_N: Floats

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def labels(self) -> int:
        """Number of answer tokens."""
        return self.sample.labels


class OnPolicyDistill(Method):
    """Answers are drawn to the data's prompts; the data's own answers are for the gate alone."""

    def __init__(self, around: Surroundings) -> None:
        rules = around.config.distill
        assert rules is not None, "checked by the job's configuration"
        self._around = around
        self._rules = rules
        self._at_once = AtOnce(around.config.hyperparameters.micro_batch)
        self._served = ServedTeacher(rules.served, around) if rules.served else None
        self._resident: Decoder | None = None
        self._drawing = Drawing(
            max_new_tokens=rules.max_new_tokens,
            temperature=1.0,
            eos_ids=around.tokenizer.eos_token_ids,
            at_once=drawn_at_once(around.draw_at_most),
        )
        self._kl = 0.0

    def updates(
        self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None, *, seed: int
    ) -> Sequence[Sequence[Item]]:
        """Have the student answer and the teacher score it; each copy answers its share."""

        def work(own: Sequence[Sample], first: int) -> list[Row]:
            return self._scored(decoder, own, lora, seed=seed + first) if own else []

        around = self._around
        with without_dropout(lora):
            rows = share_out(items, work, workers=around.workers, device=around.device)
        if self._served is not None:
            # Not with a copy's other work: while one waits for its teacher all have to.
            samples = [Sample(row["token_ids_T"], row["is_label_T"]) for row in rows]
            told = zip(rows, self._served.log_probs(samples), strict=True)
            rows = [{**row, "teacher_N": teacher_N} for row, teacher_N in told]
        self._kl = float(np.mean(np.concatenate([row["old_N"] - row["teacher_N"] for row in rows])))
        # Less their mean: what all tokens have in common says nothing about any, only noise.
        return [
            [
                ScoredAnswer(
                    sample=Sample(row["token_ids_T"], row["is_label_T"]),
                    old_N=row["old_N"],
                    advantage_N=row["teacher_N"] - row["old_N"] + self._kl,
                )
                for row in rows
            ]
        ]

    def _scored(
        self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None, *, seed: int
    ) -> list[Row]:
        """Return answers of this copy, and how likely student and local teacher find them."""
        prompts = [prompt_of(item) for item in items]
        stop = self._around.stop
        answers = draw_answers(decoder, prompts, lora, self._drawing, seed=seed, stop=stop)
        samples = [joined(p, answer) for p, answer in zip(prompts, answers, strict=True)]
        old = log_probs_by_sample(decoder, samples, lora, at_once=self._at_once)
        rows: list[Row] = [
            {"token_ids_T": sample.token_ids_T, "is_label_T": sample.is_label_T, "old_N": old_N}
            for sample, old_N in zip(samples, old, strict=True)
        ]
        if self._served is not None:
            return rows
        told = zip(rows, self._teacher_log_probs(decoder, samples), strict=True)
        return [{**row, "teacher_N": teacher_N} for row, teacher_N in told]

    def loss_sum(
        self, decoder: Decoder, items: Sequence[ScoredAnswer], lora: LoraDelta | None
    ) -> Tensor:
        """Return the summed loss, whose gradient is the reverse divergence's."""
        batch = pack([item.sample for item in items], decoder.place.device)
        new_N = token_log_probs(decoder, batch, lora)
        old_N = concatenated([item.old_N for item in items], new_N)
        advantage_N = concatenated([item.advantage_N for item in items], new_N)
        return -((new_N - old_N).exp() * advantage_N).sum()

    def count(
        self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss of the data's own answers and their number of tokens."""
        batch = pack(items, decoder.place.device)
        return token_losses_sum(decoder, batch, lora).item(), float(batch.labels)

    def measured(self) -> Mapping[str, float]:
        """Return how far the student's answers were from the teacher, in nats a token."""
        return {"kl": self._kl}

    def _teacher_log_probs(self, decoder: Decoder, samples: Sequence[Sample]) -> list[Floats]:
        if self._resident is None:
            assert self._rules.teacher is not None, "checked by the job's configuration"
            place = decoder.place
            dtype = choose_dtype(self._around.config.hyperparameters.dtype, place.device)
            self._resident = load_decoder(
                self._rules.teacher, dtype=dtype, device=place.device, group=place.group
            )
        return log_probs_by_sample(self._resident, samples, None, at_once=self._at_once)
