"""GRPO: several answers to each prompt, and each is judged beside its siblings.

Source: Shao et al., 2024 (DeepSeekMath), equations 3 and 4; the mean over all tokens of a step,
unequal clips and left-out groups as in DAPO (Yu et al., 2025).
"""

# Shapes: N answer tokens of a batch of rollouts.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.methods.policy import PolicyMethod, Rollout, concatenated
from mizzen.runtime.train.samples import Item, Prompt

_SMALLEST_SPREAD = 1e-6


class Grpo(PolicyMethod):
    """Advantages from the group alone: no value function."""

    def updates(
        self, decoder: Decoder, items: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> Sequence[Sequence[Item]]:
        """Draw the groups, judge them, and learn from them as often as the job says."""
        size = self._rules.group_size
        prompts = [prompt for prompt in items for _ in range(size)]
        rollouts = self.roll_out(decoder, prompts, lora, seed=seed)
        groups = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        judged = [judge_group(group) for group in groups]
        # A group of equals teaches nothing; if all are, there is still the reference to return to.
        told_apart = [group for group in judged if group[0].advantage_N is not None]
        kept = [r for group in told_apart for r in group] or [_unjudged(r) for r in rollouts]
        return [kept] * self._rules.epochs

    def loss_sum(
        self, decoder: Decoder, items: Sequence[Rollout], lora: LoraDelta | None
    ) -> Tensor:
        """Return the summed loss of the answers' tokens."""
        new_N = self.new_log_probs(decoder, items, lora)
        old_N = concatenated([item.old_N for item in items], new_N)
        advantage_N = concatenated([item.advantage_N for item in items], new_N)
        drift_N = concatenated([item.reference_N for item in items], new_N) - new_N
        policy_N = self.clipped((new_N - old_N).exp(), advantage_N)
        # Never below zero and, over drawn tokens, right on average (Schulman's k3).
        kl_N = drift_N.exp() - drift_N - 1
        return (policy_N + self._rules.kl_coef * kl_N).sum()


def judge_group(group: Sequence[Rollout]) -> list[Rollout]:
    """Return a prompt's rollouts with their advantages; without them where all are equal."""
    rewards = np.asarray([rollout.reward for rollout in group])
    if rewards.std() < _SMALLEST_SPREAD:
        return list(group)
    advantages = (rewards - rewards.mean()) / rewards.std()
    return [
        replace(rollout, advantage_N=rollout.weighed(np.full_like(rollout.old_N, advantage)))
        for rollout, advantage in zip(group, advantages, strict=True)
    ]


def _unjudged(rollout: Rollout) -> Rollout:
    return replace(rollout, advantage_N=np.zeros_like(rollout.old_N))
