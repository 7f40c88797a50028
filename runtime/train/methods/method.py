"""What the shared loop asks of a method: the rest of a job is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.measures import PERPLEXITY, Measure
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.trainable import NamedView


class StepNotFiniteError(Exception):
    """A step whose numbers are none, says the text; no weight has moved yet."""


class Method(ABC):
    """One way to learn. Its items are those of its shape, with what was noted about them.

    Sums are never means: the loop divides once, by the labels of all items of a step.
    """

    shape: ClassVar[Shape] = "conversation"
    measure: ClassVar[Measure] = PERPLEXITY

    @abstractmethod
    def loss_sum(self, decoder: Decoder, items: Sequence[Any], lora: LoraDelta | None) -> Tensor:
        """Return the items' summed loss, differentiable."""

    @abstractmethod
    def count(
        self, decoder: Decoder, items: Sequence[Any], lora: LoraDelta | None
    ) -> tuple[float, float]:
        """Return the sum of what the gate measures over the items, and how much that weighs."""

    def heads(self) -> Sequence[NamedView]:
        """Return weights that learn beside the model's own."""
        return ()

    def updates(
        self, decoder: Decoder, items: Sequence[Any], lora: LoraDelta | None, *, seed: int
    ) -> Sequence[Sequence[Item]]:
        """Return what each optimizer update of one step learns from; most methods make one.

        Raises:
            StepNotFiniteError: the weights as they are do not answer with numbers.
        """
        return [items]

    def measured(self) -> Mapping[str, float]:
        """Return what else the last step measured, by the names of the progress document."""
        return {}

    def files(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Return the tensors of safetensors files that are published beside the model, by name."""
        return {}

    def close(self) -> None:
        """Give back what others keep for the job, which has ended, well or not."""
        return


class NotedMethod(Method):
    """A method whose items bear what a frozen model thinks of them, asked before the first step."""

    draws: ClassVar[bool] = False  # whether the frozen model writes answers

    @abstractmethod
    def ask(self, decoder: Decoder, items: Sequence[Any], *, first: int) -> list[Tensor]:
        """Return a frozen model's note on each item; `first` is the first one's number."""

    @abstractmethod
    def note(self, item: Any, answer: Tensor) -> Item:
        """Return the item with a frozen model's note attached."""
