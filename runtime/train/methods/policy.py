"""What GRPO and PPO share: answers drawn on-policy, their rewards, and how far they drifted.

Old log-probabilities are computed by the trainer's own forward pass and not taken from drawing,
so that the ratio of the first update is one. The reference is the policy with its adapter off;
only where every weight moves is a second copy of the base kept.
"""

# Shapes: N answer tokens of a rollout or of a batch of them.
from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.batches import pack, split_micro
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.generate import Drawing, draw_answers
from mizzen.runtime.train.measures import REWARD
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.token_loss import token_log_probs
from mizzen.runtime.train.rewards import RewardModel, RuleRewards
from mizzen.runtime.train.samples import Floats, Prompt, Sample
from mizzen.runtime.train.surroundings import Surroundings


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

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def labels(self) -> int:
        """Number of answer tokens."""
        return self.sample.labels


class PolicyMethod(Method):
    """Draws answers, asks what they are worth and how likely the reference finds them."""

    shape = "prompt"
    measure = REWARD

    def __init__(self, around: Surroundings) -> None:
        config = around.config
        assert config.rl is not None, "checked by the job's configuration"
        if not around.spec.is_plain_causal:
            raise JobConfigError(
                f"Method {config.method} draws answers from models without windows and ALiBi, and "
                f"the base is {around.spec.family}. Choose another base model."
            )
        self._rules = config.rl
        self._around = around
        self._micro_batch = config.hyperparameters.micro_batch
        self._drawing = Drawing(
            max_new_tokens=self._rules.max_new_tokens,
            temperature=self._rules.temperature,
            eos_ids=around.tokenizer.eos_token_ids,
        )
        self._by_rules = RuleRewards(self._rules.rewards, around.tokenizer)
        self._reference: Decoder | None = None
        self._reward_model: RewardModel | None = None
        self._measured: dict[str, float] = {}

    def count(
        self, decoder: Decoder, items: Sequence[Prompt], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed reward of one answer to each prompt, and their number."""
        seed = zlib.crc32(b"".join(item.token_ids_T.tobytes() for item in items))
        answers = self._draw(decoder, items, lora, seed=seed)
        return sum(self._rewards(decoder, items, answers)), float(len(items))

    def measured(self) -> Mapping[str, float]:
        """Return the last step's mean reward, and its drift from the reference per token."""
        return self._measured

    @torch.no_grad()
    def roll_out(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> list[Rollout]:
        """Return an answer to each prompt, with everything but its advantage."""
        answers = self._draw(decoder, prompts, lora, seed=seed)
        rewards = self._rewards(decoder, prompts, answers)
        samples = [joined(p, answer) for p, answer in zip(prompts, answers, strict=True)]
        old = self._log_probs(decoder, samples, lora)
        reference = self._log_probs(self._reference_of(decoder), samples, None)
        rollouts = [
            Rollout(sample=sample, reward=reward, old_N=o, reference_N=r)
            for sample, reward, o, r in zip(samples, rewards, old, reference, strict=True)
        ]
        drift = np.concatenate([r.reference_N - r.old_N for r in rollouts])
        self._measured = {
            "reward": float(np.mean(rewards)),
            "kl": float(np.mean(np.exp(drift) - drift - 1)),
        }
        return rollouts

    def new_log_probs(
        self, decoder: Decoder, items: Sequence[Rollout], lora: LoraDelta | None
    ) -> Tensor:
        """Return the answers' log-probabilities now, differentiable."""
        batch = pack([item.sample for item in items], decoder.place.device)
        return token_log_probs(decoder, batch, lora, temperature=self._drawing.temperature)

    def clipped(self, ratio_N: Tensor, advantage_N: Tensor) -> Tensor:
        """Return the policy's loss of each token: gains are believed near the old policy only."""
        near_N = ratio_N.clamp(1 - self._rules.clip_low, 1 + self._rules.clip_high)
        return -torch.minimum(ratio_N * advantage_N, near_N * advantage_N)

    def _draw(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: Any, *, seed: int
    ) -> list[list[int]]:
        stop = self._around.stop
        return draw_answers(decoder, prompts, lora, self._drawing, seed=seed, stop=stop)

    def _rewards(
        self, decoder: Decoder, prompts: Sequence[Prompt], answers: Sequence[list[int]]
    ) -> list[float]:
        pairs = list(zip(prompts, answers, strict=True))
        rewards = [self._by_rules.of(answer, prompt.answer) for prompt, answer in pairs]
        if self._rules.reward_model is not None:
            model = self._reward_model_of(decoder)
            samples = [joined(*pair) for pair in pairs]
            parts = [model.of(part) for part in split_micro(samples, self._micro_batch)]
            rewards = [r + m for r, m in zip(rewards, torch.cat(parts).tolist(), strict=True)]
        penalty, ends = self._rules.missing_eos_penalty, self._drawing.eos_ids
        return [
            reward - penalty * (answer[-1] not in ends)
            for reward, answer in zip(rewards, answers, strict=True)
        ]

    def _log_probs(
        self, decoder: Decoder, samples: Sequence[Sample], lora: LoraDelta | None
    ) -> list[Floats]:
        temperature = self._drawing.temperature
        return log_probs_by_sample(
            decoder, samples, lora, at_once=self._micro_batch, temperature=temperature
        )

    def _reference_of(self, decoder: Decoder) -> Decoder:
        """Return what is never trained: the decoder behind an adapter, else a copy of the base."""
        config = self._around.config
        if config.adaptation.type != "full":
            return decoder
        if self._reference is None:
            place = decoder.place
            self._reference = load_decoder(
                config.base_model, dtype=place.dtype, device=place.device
            )
        return self._reference

    def _reward_model_of(self, decoder: Decoder) -> RewardModel:
        path, config = self._rules.reward_model, self._around.config
        if self._reward_model is None and path is not None:
            base = self._reference_of(decoder)
            self._reward_model = RewardModel(path, base_model=config.base_model, base=base)
        assert self._reward_model is not None
        return self._reward_model


@torch.no_grad()
def log_probs_by_sample(
    decoder: Decoder,
    samples: Sequence[Sample],
    lora: LoraDelta | None,
    *,
    at_once: int,
    temperature: float = 1.0,
) -> list[Floats]:
    """Return the log-probability of each sample's labels."""
    found: list[Floats] = []
    for part in split_micro(samples, at_once):
        batch = pack(part, decoder.place.device)
        values_N = token_log_probs(decoder, batch, lora, temperature=temperature)
        found += [x.cpu().numpy() for x in values_N.split(list(batch.label_counts))]
    return found


def joined(prompt: Prompt, answer: Sequence[int]) -> Sample:
    """Return a prompt with an answer, whose tokens are the labels."""
    token_ids_T = np.concatenate([prompt.token_ids_T, np.asarray(answer, np.int32)])
    return Sample(token_ids_T, np.arange(len(token_ids_T)) >= len(prompt))


def concatenated(arrays: Sequence[Floats | None], like: Tensor) -> Tensor:
    """Return rollouts' arrays as one tensor beside `like`."""
    kept = [array for array in arrays if array is not None]
    return torch.from_numpy(np.concatenate(kept)).to(like)
