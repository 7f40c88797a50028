"""The training loop: counters in, counters out, and a stop wherever a micro-batch ends.

A step is a function of the weights, the moments and the counters: its samples follow from
`counters.samples`, its random numbers from `counters.step`. That is all a checkpoint needs to
hold for a resumed run to repeat the undisturbed one bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import PackedBatch, SampleOrder, pack, split_micro, total_steps
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters, TrainState
from mizzen.runtime.train.config import Checkpointing, Hyperparameters
from mizzen.runtime.train.data import Sample
from mizzen.runtime.train.errors import LossNotFiniteError
from mizzen.runtime.train.history import LossHistory, StepRecord
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.schedule import learning_rate
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.trainable import Trainable

LossSum = Callable[[Decoder, PackedBatch, LoraDelta | None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts:
    """What a loop works with."""

    decoder: Decoder
    trainable: Trainable
    loss_sum: LossSum
    order: SampleOrder
    store: CheckpointStore
    history: LossHistory
    board: ProgressBoard
    stop: StopFlag


class Loop:
    """Runs a job's steps from its counters to its end."""

    def __init__(
        self,
        parts: LoopParts,
        *,
        hyper: Hyperparameters,
        checkpointing: Checkpointing,
        counters: Counters,
    ) -> None:
        self._parts = parts
        self._hyper = hyper
        self._checkpointing = checkpointing
        self._device = parts.decoder.place.device
        self._committed_at_s = time.monotonic()
        self.counters = counters
        self.total_steps = total_steps(
            epoch_samples=parts.order.epoch_samples,
            epochs=hyper.epochs,
            batch_size=hyper.batch_size,
            max_steps=hyper.max_steps,
        )
        parts.board.plan(
            counters=counters,
            total_steps=self.total_steps,
            epoch=self._epoch(),
            last=parts.history.last,
        )

    def run(self) -> None:
        """Make the steps that are left and commit the last one.

        Raises:
            YieldRequested: somebody asked to stop; the last whole step is the state to commit.
            LossNotFiniteError: the job diverged.
        """
        while self.counters.step < self.total_steps:
            self._step()
            if self._is_commit_due():
                self.commit()
        self.commit()

    def commit(self) -> None:
        """Commit the state as it was after the last whole step."""
        parts = self._parts
        # First the curve, so that no committed step is ever missing from it.
        parts.history.sync()
        state = TrainState(counters=self.counters, tensors=parts.trainable.state_tensors())
        parts.board.committed(parts.store.commit(state))
        self._committed_at_s = time.monotonic()

    def _step(self) -> None:
        parts, hyper, done = self._parts, self._hyper, self.counters
        step = done.step + 1
        samples = parts.order.take(done.samples, hyper.batch_size)
        loss = self._accumulate(samples, step)
        norm = _clip(parts.trainable.parameters, hyper.grad_clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise LossNotFiniteError(step)
        rate = learning_rate(
            step,
            total=self.total_steps,
            peak=hyper.learning_rate,
            warmup_ratio=hyper.warmup_ratio,
            shape=hyper.scheduler,
        )
        parts.trainable.step(learning_rate=rate)
        self.counters = Counters(
            step=step,
            samples=done.samples + len(samples),
            tokens=done.tokens + sum(map(len, samples)),
        )
        record = StepRecord(
            step=step, loss=loss, lr=rate, grad_norm=norm, tokens=self.counters.tokens
        )
        parts.history.append(record)
        parts.board.advance(record, epoch=self._epoch())

    def _accumulate(self, samples: Sequence[Sample], step: int) -> float:
        """Add up the gradients of a step's micro-batches; return the mean loss of its tokens."""
        parts = self._parts
        labels = sum(sample.labels for sample in samples)
        loss = 0.0
        for index, micro in enumerate(split_micro(samples, self._hyper.micro_batch)):
            self._check_stop()
            torch.manual_seed(_random_seed(self._hyper.seed, step, index))
            batch = pack(micro, self._device)
            micro_loss = parts.loss_sum(parts.decoder, batch, parts.trainable.lora) / labels
            micro_loss.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.item()
        return loss

    def _check_stop(self) -> None:
        """Stop here if any rank was asked to: they must all stop at the same micro-batch."""
        group = self._parts.decoder.group
        flag = torch.tensor([float(self._parts.stop.is_asked)], device=self._device)
        if group.all_reduce(flag).item() > 0:
            self._parts.trainable.drop_gradients()
            raise YieldRequested

    def _is_commit_due(self) -> bool:
        rules = self._checkpointing
        is_step_due = rules.every_steps and self.counters.step % rules.every_steps == 0
        elapsed_s = time.monotonic() - self._committed_at_s
        return bool(is_step_due or (rules.every_seconds and elapsed_s >= rules.every_seconds))

    def _epoch(self) -> float:
        return self.counters.samples / self._parts.order.epoch_samples


def _clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
    """Scale the gradients to at most `limit`, if there is one; return their norm before."""
    return torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf).item()


def _random_seed(seed: int, step: int, micro: int) -> int:
    """Return the seed of one micro-batch's random numbers: dropout repeats after a resume."""
    return (seed * 1_000_003 + step) * 1_000_003 + micro & (2**63 - 1)
