"""What a job keeps as it goes: its curve and its checkpoints. The leader's alone is on disk."""

from __future__ import annotations

import logging
from typing import Protocol

from mizzen.runtime.train.checkpoint import Committed, Counters, TrainState
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.trainable import Trainable

log = logging.getLogger(__name__)


class Ledger(Protocol):
    """What a loop writes to."""

    @property
    def last(self) -> StepRecord | None:
        """What the last step measured."""
        ...

    def append(self, record: StepRecord) -> None:
        """Add a step to the curve."""
        ...

    def commit(self, counters: Counters, trainable: Trainable) -> None:
        """Make a state safe."""
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
    """The leader's."""

    def __init__(self, store: Store, history: LossHistory, board: ProgressBoard) -> None:
        self._store = store
        self._history = history
        self._board = board

    @property
    def last(self) -> StepRecord | None:
        """What the last step measured."""
        return self._history.last

    def append(self, record: StepRecord) -> None:
        """Add a step to the curve."""
        self._history.append(record)

    def commit(self, counters: Counters, trainable: Trainable) -> None:
        """Make a state safe."""
        # First the curve, so that no committed step is ever missing from it.
        self._history.sync()
        state = TrainState(counters=counters, tensors=trainable.state_tensors())
        self._board.committed(self._store.commit(state))

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Put the last committed state back; return where it stands, None without one."""
        restored = self._store.restore()
        if restored is None:
            return None
        committed, state = restored
        log.warning("Going back to the weights of step %d.", committed.step)
        trainable.restore(state.tensors, steps=committed.step)
        self._history.cut(committed.step)
        return state.counters


class NoLedger:
    """What the others have: they take from the leader what it restored."""

    last = None

    def append(self, record: StepRecord) -> None:
        """Do nothing."""

    def commit(self, counters: Counters, trainable: Trainable) -> None:
        """Do nothing: the leader's state is this one's."""

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Return anything: the leader's follows."""
        return Counters()
