"""Which weights move: all of them, or a low-rank addition beside frozen ones."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import PackedBatch
from mizzen.runtime.train.export import check_exportable, published_dtype, write_model
from mizzen.runtime.train.loop import LossSum
from mizzen.runtime.train.trainable import Trainable, full_views


class Adapted(Protocol):
    """A model made ready to be trained in one of the two ways."""

    trainable: Trainable

    def loss_sum(self, method: LossSum) -> LossSum:
        """Return the method's loss as this adaptation computes it."""
        ...

    def round_for_publishing(self) -> None:
        """Give the weights the values that will be published: the gate must see those."""
        ...

    def write(self, folder: Path, *, base_model: Path, tokenizer: Tokenizer) -> None:
        """Write the artifact's files."""
        ...


class FullAdaptation:
    """Every weight moves. They stay float32; bfloat16 is for the matrix products alone."""

    def __init__(self, decoder: Decoder, *, weight_decay: float, dtype: torch.dtype) -> None:
        check_exportable(decoder.spec)
        self.trainable = Trainable(full_views(decoder), lora=None, weight_decay=weight_decay)
        self._decoder = decoder
        self._dtype = dtype

    def loss_sum(self, method: LossSum) -> LossSum:
        """Return the method's loss, under autocast where products are in bfloat16."""
        if self._dtype == torch.float32:
            return method

        def in_low_precision(
            decoder: Decoder, batch: PackedBatch, lora: LoraDelta | None
        ) -> Tensor:
            with torch.autocast(decoder.place.device.type, dtype=self._dtype):
                return method(decoder, batch, lora)

        return in_low_precision

    @torch.no_grad()
    def round_for_publishing(self) -> None:
        """Round to the published type and back."""
        dtype = published_dtype(self._decoder.spec)
        for _, tensor in self.trainable.weights():
            tensor.copy_(tensor.to(dtype))

    def write(self, folder: Path, *, base_model: Path, tokenizer: Tokenizer) -> None:
        """Write a complete model."""
        write_model(
            folder,
            self.trainable.weights(),
            spec=self._decoder.spec,
            base_model=base_model,
            tokenizer=tokenizer,
        )
