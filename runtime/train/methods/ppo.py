"""PPO: a value for each token says how much better than expected an answer turned out.

The details that decide whether it works follow Huang et al., 2024 ("The N+ implementation details
of RLHF with PPO"): KL as a reward of each token, whitened rewards and advantages, clipped ratio
and value, a penalty where an answer does not end.

Sources: Schulman et al., 2017, equation 7; GAE: Schulman et al., 2016, equation 16.
"""

# Shapes: N answer tokens, D model width.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.policy import PolicyMethod, Rollout, concatenated
from mizzen.runtime.train.methods.token_loss import head_log_probs, hidden_states
from mizzen.runtime.train.samples import Floats, Item, Prompt
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.trainable import NamedView

_TINY = 1e-8


class Ppo(PolicyMethod):
    """Policy and value share the decoder; the value is one more row at its end."""

    def __init__(self, around: Surroundings) -> None:
        super().__init__(around)
        self._head_1D = nn.Parameter(torch.zeros(1, around.spec.hidden_size, device=around.device))

    def heads(self) -> Sequence[NamedView]:
        """Return the value's row."""
        return [NamedView("value_head.weight", self._head_1D, self._head_1D)]

    def updates(
        self, decoder: Decoder, items: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> Sequence[Sequence[Item]]:
        """Draw answers, work out their advantages, and learn from them as often as told."""
        rollouts = self.roll_out(decoder, items, lora, seed=seed)
        return [self.judge(rollouts)] * self._rules.epochs

    def answer(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> list[Rollout]:
        """Return answers, and the value of each of their tokens."""
        rollouts = super().answer(decoder, prompts, lora, seed=seed)
        return self._with_values(decoder, rollouts, lora)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Return rollouts with their advantages and the returns that values shall learn."""
        rules = self._rules
        rewards = [token_rewards(rollout, kl_coef=rules.kl_coef) for rollout in rollouts]
        if rules.whiten_rewards:
            # The scale only: the mean says whether answers are good at all.
            scale = np.concatenate(rewards).std() + _TINY
            rewards = [reward / scale for reward in rewards]
        advantages = []
        for rollout, reward_N in zip(rollouts, rewards, strict=True):
            assert rollout.value_N is not None
            advantages.append(
                gae(reward_N, rollout.value_N, gamma=rules.gamma, gae_lambda=rules.gae_lambda)
            )
        everything = np.concatenate(advantages)
        mean, scale = everything.mean(), everything.std() + _TINY
        return [
            replace(
                rollout,
                advantage_N=rollout.weighed(((advantage_N - mean) / scale).astype(np.float32)),
                return_N=(advantage_N + rollout.value_N).astype(np.float32),
            )
            for rollout, advantage_N in zip(rollouts, advantages, strict=True)
        ]

    def loss_sum(
        self, decoder: Decoder, items: Sequence[Rollout], lora: LoraDelta | None
    ) -> Tensor:
        """Return the summed loss of the answers' tokens: policy and value."""
        rules = self._rules
        batch = pack([item.sample for item in items], decoder.place.device)
        hidden_ND = hidden_states(decoder, batch, lora)[batch.source_N]
        new_N = head_log_probs(
            decoder, hidden_ND, batch.target_N, temperature=self._drawing.temperature
        )
        old_N = concatenated([item.old_N for item in items], new_N)
        advantage_N = concatenated([item.advantage_N for item in items], new_N)
        policy_N = self.clipped((new_N - old_N).exp(), advantage_N)
        value_N = self._values(hidden_ND)
        before_N = concatenated([item.value_N for item in items], value_N)
        return_N = concatenated([item.return_N for item in items], value_N)
        near_N = before_N + (value_N - before_N).clamp(-rules.value_clip, rules.value_clip)
        error_N = torch.maximum((value_N - return_N).square(), (near_N - return_N).square())
        return (policy_N + 0.5 * rules.value_coef * error_N).sum()

    def _values(self, hidden_ND: Tensor) -> Tensor:
        # No matmul: under autocast that would round the head.
        return (hidden_ND.float() * self._head_1D).sum(-1)

    def _with_values(
        self, decoder: Decoder, rollouts: Sequence[Rollout], lora: LoraDelta | None
    ) -> list[Rollout]:
        def valued(part: Sequence[Rollout], _: int) -> list[Rollout]:
            batch = pack([rollout.sample for rollout in part], decoder.place.device)
            values_N = self._values(hidden_states(decoder, batch, lora)[batch.source_N])
            by_sample = values_N.split(list(batch.label_counts))
            return [
                replace(rollout, value_N=value_N.cpu().numpy())
                for rollout, value_N in zip(part, by_sample, strict=True)
            ]

        return self._at_once.in_parts(rollouts, valued, ranks=decoder.group.size)


def token_rewards(rollout: Rollout, *, kl_coef: float) -> Floats:
    """Return each token's reward: what it drifted from the reference, and the answer's at the end.

    A drift costs, so that the policy stays where the reward can be believed.
    """
    reward_N = -kl_coef * (rollout.old_N - rollout.reference_N)
    reward_N[-1] += rollout.reward
    return reward_N


def gae(reward_N: Floats, value_N: Floats, *, gamma: float, gae_lambda: float) -> Floats:
    """Return how much better than its value each token turned out; after the last comes nothing."""
    advantage_N = np.zeros_like(reward_N)
    later, next_value = 0.0, 0.0
    for t in range(len(reward_N) - 1, -1, -1):
        surprise = reward_N[t] + gamma * next_value - value_N[t]
        later = surprise + gamma * gae_lambda * later
        advantage_N[t], next_value = later, value_N[t]
    return advantage_N
