"""What a job keeps as it goes: its curve and its checkpoints. The leader's alone is on disk."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from mizzen.runtime.host import memory_available_bytes
from mizzen.runtime.train.checkpoint import Committed, Counters, TrainState, bytes_of
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.trainable import Trainable

log = logging.getLogger(__name__)

# Of the memory that is free, a copy of a state takes at most one part in so many.
_COPY_SHARE = 4


class Ledger(Protocol):
    """What a loop writes to."""

    @property
    def last(self) -> StepRecord | None:
        """What the last step measured."""
        ...

    def append(self, record: StepRecord) -> None:
        """Add a step to the curve."""
        ...

    def commit(self, counters: Counters, trainable: Trainable, *, can_wait: bool = False) -> None:
        """Make a state safe before this returns; one that can wait, while further steps run."""
        ...

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Put the last committed state back; return where it stands, None without one."""
        ...


class Store(Protocol):
    """Where a leader's checkpoints are."""

    def commit(self, state: TrainState) -> Committed:
        """Make a state safe."""
        ...

    def restore(self) -> tuple[Committed, TrainState] | None:
        """Return the newest undamaged state."""
        ...


class DiskLedger:
    """The leader's.

    With `writes_beside` a state that can wait is copied and written by a thread, one at a time.
    What goes wrong there is raised by the next step or commit.
    """

    def __init__(
        self,
        store: Store,
        history: LossHistory,
        board: ProgressBoard,
        *,
        writes_beside: bool = False,
    ) -> None:
        self._store = store
        self._history = history
        self._board = board
        self._beside = ThreadPoolExecutor(1, "checkpoints") if writes_beside else None
        self._pending: Future[None] | None = None

    @property
    def last(self) -> StepRecord | None:
        """What the last step measured."""
        return self._history.last

    def append(self, record: StepRecord) -> None:
        """Add a step to the curve."""
        if self._pending is not None and self._pending.done():
            self._settle()
        self._history.append(record)

    def commit(self, counters: Counters, trainable: Trainable, *, can_wait: bool = False) -> None:
        """Make a state safe; one that can wait is written beside where memory holds a copy."""
        self._settle()
        state = TrainState(counters=counters, tensors=trainable.state_tensors())
        has_room = bytes_of(state) * _COPY_SHARE <= memory_available_bytes()
        if can_wait and self._beside is not None and has_room:
            self._pending = self._beside.submit(self._write, _copied(state))
        else:
            self._write(state)

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Put the last committed state back; return where it stands, None without one."""
        self._settle()
        restored = self._store.restore()
        if restored is None:
            return None
        committed, state = restored
        log.warning("Going back to the weights of step %d.", committed.step)
        trainable.restore(state.tensors, steps=committed.step)
        self._history.cut(committed.step)
        return state.counters

    def _write(self, state: TrainState) -> None:
        # First the curve, so that no committed step is ever missing from it.
        self._history.sync()
        self._board.committed(self._store.commit(state))

    def _settle(self) -> None:
        """Wait for what is being written; raise what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _copied(state: TrainState) -> TrainState:
    """Return a state in the host's memory, which no further step changes."""
    layout = torch.contiguous_format
    tensors = {
        kind: {n: t.to("cpu", copy=True, memory_format=layout) for n, t in named.items()}
        for kind, named in state.tensors.items()
    }
    return TrainState(counters=state.counters, tensors=tensors)


class NoLedger:
    """What the others have: they take from the leader what it restored."""

    last = None

    def append(self, record: StepRecord) -> None:
        """Do nothing."""

    def commit(self, counters: Counters, trainable: Trainable, *, can_wait: bool = False) -> None:
        """Do nothing: the leader's state is this one's."""

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Return anything: the leader's follows."""
        return Counters()
