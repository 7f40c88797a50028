"""Supervised fine-tuning: predict the assistant's next token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.token_loss import token_losses_sum
from mizzen.runtime.train.samples import Sample


class Sft(Method):
    """Cross entropy of the labelled tokens."""

    def loss_sum(self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None) -> Tensor:
        """Return the summed loss of the items' labelled tokens."""
        return token_losses_sum(decoder, pack(items, decoder.place.device), lora)

    def count(
        self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the summed loss and the number of tokens."""
        loss = self.loss_sum(decoder, items, lora).item()
        return loss, float(sum(item.labels for item in items))
