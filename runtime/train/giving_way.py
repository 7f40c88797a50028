"""Looks up at every linear and at every sample read: somebody may want the model."""

# Shapes: T packed tokens, I a linear's input width.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.render import ChatRenderer

GiveWay = Callable[[], None]


class GivingWay:
    """An adapter, or the bare model, whose computation pauses where it stands, both ways.

    What is computed so far stays: a step that was interrupted ten times is the step it would have
    been, and only took longer.
    """

    def __init__(self, lora: LoraDelta | None, give_way: GiveWay) -> None:
        self._lora = lora
        self._give_way = give_way

    def delta(self, layer: int, target: str, x_TI: Tensor) -> Tensor | None:
        """Return what the adapter adds, None for the bare model."""
        self._give_way()
        delta = None if self._lora is None else self._lora.delta(layer, target, x_TI)
        if delta is not None and delta.requires_grad:
            delta.register_hook(lambda _: self._give_way())
        return delta


class GivingWayRenderer:
    """A renderer that pauses before each conversation: all of a dataset's take seconds."""

    def __init__(self, renderer: ChatRenderer, give_way: GiveWay) -> None:
        self._renderer = renderer
        self._give_way = give_way

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end a turn."""
        return self._renderer.eos_token_ids

    def render_for_training(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and, for each, whether the assistant wrote it (its end included)."""
        self._give_way()
        return self._renderer.render_for_training(messages)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens that ask the model for its next turn."""
        self._give_way()
        return self._renderer.apply_chat_template(messages)
