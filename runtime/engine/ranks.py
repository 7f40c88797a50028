"""How the loop reaches the model: one rank in this process, or a group that rank 0 leads."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from mizzen.runtime.engine.batch import StepInput
from mizzen.runtime.engine.runner import Runner
from mizzen.runtime.model.lora import Adapter


class Ranks(Protocol):
    """Every rank of the model, driven as one."""

    def run(self, step: StepInput) -> Tensor | None:
        """Compute a step; return float32 logits_NV of the tokens to sample from."""

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot on every rank."""

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot on every rank."""

    def check(self) -> None:
        """Raise RankLostError if a rank is gone."""

    def stop(self) -> None:
        """End the other ranks."""


class SingleRank:
    """The whole model in this process: no message, no copy."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.run = runner.run

    def load_adapter(self, slot: int, adapter: Adapter, path: Path) -> None:
        """Fill a slot."""
        self._runner.load_adapter(slot, adapter)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        self._runner.clear_adapter(slot)

    def check(self) -> None:
        """There is no other rank to lose."""

    def stop(self) -> None:
        """There is no other rank to end."""
