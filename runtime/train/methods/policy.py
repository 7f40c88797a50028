"""What GRPO and PPO share: answers drawn on-policy, their rewards, and how far they drifted.

Old log-probabilities are computed by the trainer's own forward pass and not taken from drawing,
so that the ratio of the first update is one. Whoever else draws may compute in other precision and
find the tokens a little more or less likely: their advantages are weighed by that ratio, which is
truncated so that a few tokens do not decide a step.

Source: Yao et al., 2025 ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"),
truncated importance sampling.
"""

# Shapes: N answer tokens of a rollout or of a batch of them.
from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.copies import Row, share_out
from mizzen.runtime.train.generate import draw_answers, drawing_of
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.measures import REWARD
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.token_loss import log_probs_by_sample, token_log_probs
from mizzen.runtime.train.roles.cast import cast_roles
from mizzen.runtime.train.samples import Floats, Prompt, Sample, joined
from mizzen.runtime.train.surroundings import Surroundings

_MOST_WEIGHT_LOG = float(np.log(2.0))  # the source's bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A prompt with an answer drawn for it, and all that a step knows about the answer."""

    sample: Sample
    reward: float
    old_N: Floats  # log-probabilities when it was drawn
    reference_N: Floats
    advantage_N: Floats | None = None
    value_N: Floats | None = None
    return_N: Floats | None = None
    weight_N: Floats | None = None  # of each token where another than the trainer drew it

    def weighed(self, advantage_N: Floats) -> Floats:
        """Return advantages as they count for tokens that were drawn so."""
        return advantage_N if self.weight_N is None else advantage_N * self.weight_N

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def labels(self) -> int:
        """Number of answer tokens."""
        return self.sample.labels

    def to_row(self) -> Row:
        """Return what was found out about the answer, as other copies of the model take it."""
        found = {
            "token_ids_T": self.sample.token_ids_T,
            "is_label_T": self.sample.is_label_T,
            "reward": np.asarray([self.reward]),
            "old_N": self.old_N,
            "reference_N": self.reference_N,
            "value_N": self.value_N,
            "weight_N": self.weight_N,
        }
        return {name: array for name, array in found.items() if array is not None}

    @classmethod
    def of_row(cls, row: Row) -> Rollout:
        """Return what `to_row` gave."""
        return cls(
            sample=Sample(row["token_ids_T"], row["is_label_T"]),
            reward=row["reward"].item(),
            old_N=row["old_N"],
            reference_N=row["reference_N"],
            value_N=row.get("value_N"),
            weight_N=row.get("weight_N"),
        )


class PolicyMethod(Method):
    """Draws answers, asks what they are worth and how likely the reference finds them."""

    shape = "prompt"
    measure = REWARD

    def __init__(self, around: Surroundings) -> None:
        config = around.config
        assert config.rl is not None, "checked by the job's configuration"
        self._rules = config.rl
        self._around = around
        self._at_once = AtOnce(config.hyperparameters.micro_batch)
        self._drawing = drawing_of(self._rules, around.tokenizer, at_most=around.draw_at_most)
        self._roles = cast_roles(around)
        self._measured: dict[str, float] = {}

    def count(
        self, decoder: Decoder, items: Sequence[Prompt], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed reward of one answer to each prompt, and their number."""
        seed = zlib.crc32(b"".join(item.token_ids_T.tobytes() for item in items))
        # By the trainer itself, also where others draw for its steps: they have no base any more.
        stop = self._around.stop
        answers = draw_answers(decoder, items, lora, self._drawing, seed=seed, stop=stop)
        return sum(self._roles.judge(decoder, items, answers)()), float(len(items))

    def measured(self) -> Mapping[str, float]:
        """Return the last step's mean reward, and its drift from the reference per token."""
        return self._measured

    @torch.no_grad()
    def roll_out(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> list[Rollout]:
        """Return an answer to each prompt, with everything but its advantage.

        Each copy of the model answers its share of the prompts.
        """

        def work(own: Sequence[Prompt], first: int) -> list[Row]:
            found = self.answer(decoder, own, lora, seed=seed + first) if own else []
            return [rollout.to_row() for rollout in found]

        with without_dropout(lora):
            rows = share_out(
                prompts, work, workers=self._around.workers, device=self._around.device
            )
        rollouts = [Rollout.of_row(row) for row in rows]
        drift = np.concatenate([r.reference_N - r.old_N for r in rollouts])
        self._measured = {
            "reward": float(np.mean([r.reward for r in rollouts])),
            "kl": float(np.mean(np.exp(drift) - drift - 1)),
        }
        return rollouts

    def answer(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> list[Rollout]:
        """Return answers that this copy of the model draws, and what they are worth."""
        drawn = self._roles.draw(decoder, prompts, lora, seed=seed)
        answers = drawn.token_ids
        samples = [joined(p, answer) for p, answer in zip(prompts, answers, strict=True)]
        # Whoever else plays a role does so while the trainer computes.
        judged = self._roles.judge(decoder, prompts, answers)
        compared = self._roles.compare(decoder, samples)
        old = log_probs_by_sample(
            decoder, samples, lora, at_once=self._at_once, temperature=self._rules.temperature
        )
        weights = importance(old, drawn.log_probs)
        told = zip(samples, judged(), old, compared(), weights, strict=True)
        return [
            Rollout(sample=sample, reward=reward, old_N=o, reference_N=r, weight_N=w)
            for sample, reward, o, r, w in told
        ]

    def new_log_probs(
        self, decoder: Decoder, items: Sequence[Rollout], lora: LoraDelta | None
    ) -> Tensor:
        """Return the answers' log-probabilities now, differentiable."""
        batch = pack([item.sample for item in items], decoder.place.device)
        return token_log_probs(decoder, batch, lora, temperature=self._drawing.temperature)

    def close(self) -> None:
        """Have whoever plays the roles give back what they keep."""
        self._roles.close()

    def clipped(self, ratio_N: Tensor, advantage_N: Tensor) -> Tensor:
        """Return the policy's loss of each token: gains are believed near the old policy only."""
        near_N = ratio_N.clamp(1 - self._rules.clip_low, 1 + self._rules.clip_high)
        return -torch.minimum(ratio_N * advantage_N, near_N * advantage_N)


def importance(old: Sequence[Floats], drawn: Sequence[Floats] | None) -> Sequence[Floats | None]:
    """Return how much likelier than whoever drew it the policy finds each token, truncated."""
    if drawn is None:
        return [None] * len(old)
    return [
        np.exp(np.minimum(old_N - drawn_N, _MOST_WEIGHT_LOG)).astype(np.float32)
        for old_N, drawn_N in zip(old, drawn, strict=True)
    ]


@contextmanager
def without_dropout(lora: LoraDelta | None) -> Iterator[None]:
    """Let an adapter answer as it will be served: with dropout it would be another policy."""
    if not isinstance(lora, nn.Module):
        yield
        return
    was_training = lora.training
    lora.eval()
    try:
        yield
    finally:
        lora.train(was_training)


def concatenated(arrays: Sequence[Floats | None], like: Tensor) -> Tensor:
    """Return rollouts' arrays as one tensor beside `like`."""
    kept = [array for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(kept)).to(like)
