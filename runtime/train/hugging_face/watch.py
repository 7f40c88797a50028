"""What a job wants of each step: a look at the stop flag, a record, and a commit when due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.budget import Spent, find_spent
from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.errors import LossNotFiniteError
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.loop import random_seed
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.stop import StopFlag


@dataclass(kw_only=True, eq=False)
class JobCallback(TrainerCallback):
    """Counts the steps of one job; `commit` makes the state after the last whole one safe."""

    config: TrainConfig
    order: SampleOrder
    counters: Counters
    history: LossHistory
    board: ProgressBoard
    stop: StopFlag
    commit: Callable[[], None]

    def __post_init__(self) -> None:
        self._committed_at_s = self._began_at_s = time.monotonic()

    @property
    def epoch(self) -> float:
        """How often the data was seen."""
        return self.counters.samples / self.order.epoch_samples

    @property
    def spent(self) -> Spent | None:
        """What part of the budget is used up."""
        return find_spent(self.config.budget, self.counters)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the step's random numbers follow from its number, so that a resume repeats them.

        Raises:
            YieldRequested: somebody asked to stop; nothing has moved since the last whole step.
        """
        self.stop.check()
        self._began_at_s = time.monotonic()
        torch.manual_seed(random_seed(self.config.hyperparameters.seed, state.global_step + 1, 0))

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Look between two micro-batches; see `on_step_begin`."""
        self.stop.check()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step, and end where the budget does."""
        done, batch = self.counters, self.config.hyperparameters.batch_size
        samples = self.order.take(done.samples, batch)
        elapsed_ms = (time.monotonic() - self._began_at_s) * 1000
        self.counters = replace(
            done,
            step=state.global_step,
            samples=done.samples + batch,
            tokens=done.tokens + sum(map(len, samples)),
            trained_ms=done.trained_ms + round(elapsed_ms),
        )
        control.should_training_stop |= self.spent is not None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float],
        **_: Any,
    ) -> None:
        """Record the step, whose last word this is, and commit where that is due.

        Raises:
            LossNotFiniteError: the job diverged; what is committed is from before.
        """
        if "loss" not in logs:
            return  # the Trainer's summary of the whole run
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise LossNotFiniteError(state.global_step)
        record = StepRecord(
            step=state.global_step,
            loss=loss,
            lr=float(logs["learning_rate"]),
            grad_norm=norm,
            tokens=self.counters.tokens,
        )
        self.history.append(record)
        self.board.advance(record, epoch=self.epoch)
        # The curve is ours: in the Trainer's state it would be written again with each checkpoint.
        state.log_history.clear()
        rules, elapsed_s = self.config.checkpoint, time.monotonic() - self._committed_at_s
        if rules.is_step_due(self.counters.step) or rules.is_time_up(elapsed_s):
            self.commit()
            self._committed_at_s = time.monotonic()
