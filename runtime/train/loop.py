"""The training loop: counters in, counters out, and a stop wherever a micro-batch ends.

A step is a function of the weights, the moments and the counters: its samples follow from
`counters.samples`, its random numbers from `counters.step`. That is all a checkpoint needs to
hold for a resumed run to repeat the undisturbed one bit by bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import SampleOrder, total_steps
from mizzen.runtime.train.budget import Spent, find_spent
from mizzen.runtime.train.checkpoint import Counters
from mizzen.runtime.train.clip import clip_gradients
from mizzen.runtime.train.config import Budget, Checkpointing, Hyperparameters
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.errors import LossNotFiniteError
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.ledger import Ledger
from mizzen.runtime.train.methods.method import Method, StepNotFiniteError
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.schedule import learning_rate
from mizzen.runtime.train.stop import Stop, YieldRequested
from mizzen.runtime.train.trainable import Trainable
from mizzen.runtime.train.workers import Workers

log = logging.getLogger(__name__)

# So many batches in a row that give no finite gradient are not the batches' fault.
_BAD_IN_A_ROW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts:
    """What a loop works with."""

    decoder: Decoder
    trainable: Trainable
    lora: LoraDelta | None  # the trainable one, where that is what moves
    method: Method
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    order: SampleOrder
    ledger: Ledger
    board: ProgressBoard
    stop: Stop
    workers: Workers
    validate: Callable[[int], None] | None = None  # of a committed step, where the best are kept


class Loop:
    """Runs a job's steps from its counters to its end."""

    def __init__(
        self,
        parts: LoopParts,
        *,
        hyper: Hyperparameters,
        checkpointing: Checkpointing,
        budget: Budget,
        counters: Counters,
    ) -> None:
        self._parts = parts
        self._hyper = hyper
        self._checkpointing = checkpointing
        self._device = parts.decoder.place.device
        self._budget = budget
        self._committed_at_s = self._timed_at_s = time.monotonic()
        self._untold_ms = 0.0  # of training, since the last whole step
        self._at_once = AtOnce(hyper.micro_batch)
        self._bad_in_a_row = 0
        self._is_rolled_back = False
        self._is_commit_wanted = False  # by the leader's clock
        self.counters = counters
        self.is_whole = True  # no update is made that belongs to a step which is not
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
            last=parts.ledger.last,
        )

    def run(self) -> None:
        """Make the steps that are left, or those the budget is enough for; commit the last one.

        A batch without a finite gradient is skipped; several in a row mean that the weights
        themselves went astray, so the last committed ones are taken, once.

        Raises:
            YieldRequested: somebody asked to stop; the last whole step is the state to commit.
            LossNotFiniteError: the job diverged.
            MemoryTooSmallError: not even one sample fits.
            FewerAtOnce: not as many fit as ranks of one model run at once.
        """
        self._validate()
        self._timed_at_s = time.monotonic()
        while self.counters.step < self.total_steps and self._spent() is None:
            try:
                self._step()
            except StepNotFiniteError as error:
                self._skip(str(error))
                continue
            self._bad_in_a_row = 0
            is_step_due = self._checkpointing.is_step_due(self.counters.step)
            if is_step_due or self._is_commit_wanted:
                # What is measured next has to be on the disk.
                self.commit(can_wait=self._parts.validate is None)
                self._validate()
        self.commit()
        self._validate(is_last=True)
        if self.counters.step < self.total_steps:
            self._parts.board.ended_early(self._spent())

    def _validate(self, *, is_last: bool = False) -> None:
        """Measure the weights where that is due by the number of steps, whatever commits there are.

        A run that was interrupted then measures the same steps as one that was not.
        """
        step = self.counters.step
        is_due = is_last or self._checkpointing.is_step_due(step)
        if self._parts.validate is not None and is_due:
            self._parts.validate(step)
            self._timed_at_s = time.monotonic()  # no step has taken this time

    def _spent(self) -> Spent | None:
        return find_spent(self._budget, self.counters)

    def commit(self, *, can_wait: bool = False) -> None:
        """Commit the state as it was after the last whole step."""
        began_at_s = time.monotonic()
        self._parts.ledger.commit(self.counters, self._parts.trainable, can_wait=can_wait)
        self._committed_at_s = time.monotonic()
        self._timed_at_s += self._committed_at_s - began_at_s  # no step has taken this time

    def take_from_leader(self) -> None:
        """Go on from where the leader stands: its files are the only ones."""
        parts = self._parts
        fields = asdict(self.counters)
        counters = torch.tensor(list(fields.values()), device=self._device)
        parts.workers.copy_from_leader(counters)
        parts.workers.copy_from_first_copy(parts.trainable.held())
        self.counters = Counters(**dict(zip(fields, counters.tolist(), strict=True)))
        parts.trainable.steps = self.counters.step

    def _step(self) -> None:
        parts, hyper, done = self._parts, self._hyper, self.counters
        step = done.step + 1
        samples = parts.order.take(done.samples, hyper.batch_size)
        rate = learning_rate(
            step,
            total=self.total_steps,
            peak=hyper.learning_rate,
            warmup_ratio=hyper.warmup_ratio,
            shape=hyper.scheduler,
        )
        losses, norm, tokens = [], 0.0, 0
        seed = random_seed(hyper.seed, step, 0)
        with parts.precision():
            updates = parts.method.updates(parts.decoder, samples, parts.lora, seed=seed)
        for number, items in enumerate(updates):
            # Between two updates no checkpoint could be taken, so only the first can be stopped.
            can_stop = number == 0
            work = partial(self._accumulate, items, step, can_stop=can_stop)
            of = parts.workers.share(len(items)).size
            loss = self._at_once.fit(work, of=of, ranks=parts.workers.tensor.size)
            loss = self._agree(loss, can_stop=can_stop)
            norm = clip_gradients(parts.trainable, parts.workers.tensor, limit=hyper.grad_clip)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                parts.trainable.drop_gradients()
                raise StepNotFiniteError("the loss or its gradient is not a finite number")
            self.is_whole = False
            parts.trainable.step(learning_rate=rate)
            losses.append(loss)
            tokens += sum(map(len, items)) if number == 0 else 0
        self.counters = replace(
            done,
            step=step,
            samples=done.samples + len(samples),
            tokens=done.tokens + tokens,
            trained_ms=done.trained_ms + round(self._untold_ms),
        )
        self._untold_ms = 0.0
        self.is_whole = True
        record = StepRecord(
            step=step,
            loss=sum(losses) / len(losses),
            lr=rate,
            grad_norm=norm,
            tokens=self.counters.tokens,
            measured=dict(parts.method.measured()),
        )
        parts.ledger.append(record)
        parts.board.advance(record, epoch=self._epoch())

    def _skip(self, why: str) -> None:
        """Go on with the samples after a bad batch, from the last committed weights if need be."""
        self._bad_in_a_row += 1
        step, batch = self.counters.step + 1, self._hyper.batch_size
        self.counters = replace(
            self.counters,
            samples=self.counters.samples + batch,
            skipped=self.counters.skipped + batch,
        )
        self._parts.board.skipped(self.counters)
        log.warning("Step %d: %s; its samples are skipped.", step, why)
        if self._bad_in_a_row < _BAD_IN_A_ROW:
            return
        parts = self._parts
        back = None if self._is_rolled_back else parts.ledger.roll_back(parts.trainable)
        if back is None:
            raise LossNotFiniteError(step, why)
        kept = ("samples", "skipped", "trained_ms")  # not undone with the weights
        self.counters = replace(back, **{name: getattr(self.counters, name) for name in kept})
        self.take_from_leader()
        self._is_rolled_back, self._bad_in_a_row = True, 0

    def _accumulate(self, items: Sequence[Item], step: int, *, can_stop: bool) -> float:
        """Add up the gradients of this worker's micro-batches; return its part of the mean loss."""
        parts = self._parts
        # Of a try for which memory ran out.
        parts.trainable.drop_gradients()
        labels = sum(item.labels for item in items)
        own = parts.workers.share(len(items))
        loss = 0.0
        for first in range(own.start, own.stop, self._at_once.samples):
            if can_stop and parts.stop.is_asked:
                break  # nobody will use the sum
            micro = items[first : min(first + self._at_once.samples, own.stop)]
            torch.manual_seed(random_seed(self._hyper.seed, step, first))
            with parts.precision():
                micro_loss = parts.method.loss_sum(parts.decoder, micro, parts.lora)
            micro_loss = micro_loss / labels
            micro_loss.backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.item()
        return loss

    def _agree(self, loss: float, *, can_stop: bool) -> float:
        """Sum gradients and loss over the workers; stop here if any of them was asked to."""
        parts, workers = self._parts, self._parts.workers
        # One clock for all: with their own, some would take a last step without the others, or
        # write a part of a checkpoint that the others do not.
        elapsed_ms = self._elapsed_ms() if workers.is_leader else 0.0
        since_commit_s = time.monotonic() - self._committed_at_s
        is_time_up = workers.is_leader and self._checkpointing.is_time_up(since_commit_s)
        # Workers that share a copy have one loss.
        own_loss = loss if workers.tensor.rank == 0 else 0.0
        values = [own_loss, float(parts.stop.is_asked), elapsed_ms, float(is_time_up)]
        loss, asked, elapsed_ms, time_up = workers.sum_with_gradients(
            parts.trainable.parameters, values
        )
        self._is_commit_wanted = bool(time_up)
        if asked and can_stop:
            parts.trainable.drop_gradients()
            raise YieldRequested
        self._untold_ms += elapsed_ms
        return loss

    def _elapsed_ms(self) -> float:
        before_s, self._timed_at_s = self._timed_at_s, time.monotonic()
        return (self._timed_at_s - before_s) * 1000

    def _epoch(self) -> float:
        return self.counters.samples / self._parts.order.epoch_samples


def random_seed(seed: int, step: int, first: int) -> int:
    """Return the seed of a micro-batch's random numbers: dropout repeats after a resume."""
    return (seed * 1_000_003 + step) * 1_000_003 + first & (2**63 - 1)
