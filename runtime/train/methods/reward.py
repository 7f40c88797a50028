"""A reward model: one number for a whole conversation, higher for the answer people prefer.

An answer that stands alone is judged beside the reward of zero, which no preference gives.

Source: Bradley and Terry, 1952, as the reward modelling loss of Ouyang et al., 2022, equation 1.
"""

# Shapes: T packed tokens, S samples, J judgements, D model width.
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.measures import PREFERENCE_LOSS
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.token_loss import hidden_states
from mizzen.runtime.train.samples import Pair, Rating, Sample
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.trainable import NamedView

HEAD_FILE = "reward_head.safetensors"
HEAD_NAME = "reward_head.weight"


class Reward(Method):
    """The sigmoid loss of how much more the better version is worth."""

    shape = "judgement"
    measure = PREFERENCE_LOSS

    def __init__(self, around: Surroundings) -> None:
        # From zero, an untrained model prefers nothing: its loss is log 2 exactly.
        self._head_1D = nn.Parameter(torch.zeros(1, around.spec.hidden_size, device=around.device))

    def heads(self) -> Sequence[NamedView]:
        """Return the head that turns a hidden state into a reward."""
        return [NamedView(HEAD_NAME, self._head_1D, self._head_1D)]

    def loss_sum(
        self, decoder: Decoder, items: Sequence[Pair | Rating], lora: LoraDelta | None
    ) -> Tensor:
        """Return the judgements' summed loss."""
        told = [(j, sign, s) for j, item in enumerate(items) for sign, s in _versions(item)]
        reward_S = rewards_of(decoder, [sample for *_, sample in told], lora, self._head_1D)
        sign_S = reward_S.new_tensor([sign for _, sign, _ in told])
        place_S = torch.tensor([j for j, *_ in told], device=reward_S.device)
        margin_J = reward_S.new_zeros(len(items)).index_add(0, place_S, sign_S * reward_S)
        return -F.logsigmoid(margin_J).sum()

    def count(
        self, decoder: Decoder, items: Sequence[Pair | Rating], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss and the number of judgements."""
        return self.loss_sum(decoder, items, lora).item(), float(len(items))

    def files(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the head, which lies beside the adapter or the model."""
        return {HEAD_FILE: {HEAD_NAME: self._head_1D.detach().cpu().contiguous()}}


def _versions(item: Pair | Rating) -> list[tuple[float, Sample]]:
    """Return an item's conversations, each with whether more reward is better or worse."""
    if isinstance(item, Pair):
        return [(1.0, item.chosen), (-1.0, item.rejected)]
    return [(1.0 if item.is_liked else -1.0, item.sample)]


def rewards_of(
    decoder: Decoder, samples: Sequence[Sample], lora: LoraDelta | None, head_1D: Tensor
) -> Tensor:
    """Return reward_S, read off each sample's last token, which has seen all the others."""
    batch = pack(samples, decoder.place.device)
    ends_S = torch.tensor(batch.lengths, device=decoder.place.device).cumsum(0) - 1
    hidden_SD = hidden_states(decoder, batch, lora)[ends_S].float()
    # No matmul: under autocast that would round the head.
    return (hidden_SD * head_1D).sum(-1)
