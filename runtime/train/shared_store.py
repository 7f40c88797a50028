"""A job's checkpoints where several ranks have parts of its tensors: each writes and reads its own.

The leader makes the folder and, once every rank's files are on the disk, the manifest.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mizzen.runtime.train.checkpoint import (
    CheckpointStore,
    Committed,
    Counters,
    TrainState,
    bytes_of,
)
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.durable import sha256_of, storage_faults_of, sync_path
from mizzen.runtime.train.parts import write_tensors
from mizzen.runtime.train.together import Together
from mizzen.runtime.train.trainable import Trainable


class LeadingStore:
    """The leader's side. Whatever it raises ends this process, and with it the other ranks."""

    def __init__(self, store: CheckpointStore, ranks: Together, trainable: Trainable) -> None:
        self._store = store
        self._ranks = ranks
        self._trainable = trainable

    def commit(self, state: TrainState) -> Committed:
        """Write a state; when this returns, a power cut cannot take it back.

        Raises:
            StorageFullError: there is no room; earlier checkpoints stay as they are.
            RankLostError: another rank is gone, perhaps since it could not write its part.
        """
        if (known := self._store.find(state.counters.step)) is not None:
            self._ranks.tell(None)
            return known

        def fill(folder: Path) -> dict[str, str]:
            self._ranks.tell(folder.name)
            return _write_own(folder, state, self._ranks, self._trainable)

        need_bytes = bytes_of(state) * self._ranks.group.size
        return self._store.commit_files(state.counters, fill, need_bytes=need_bytes)

    def restore(self) -> tuple[Committed, TrainState] | None:
        """Return this rank's part of the newest undamaged state; as `CheckpointStore.restore`."""
        newest = self._store.find_newest()
        self._ranks.tell(None if newest is None else newest[0].step)
        if newest is None:
            return None
        return newest[0], self._store.read(newest[0].step, self._trainable.wanted())


class SharedCheckpoints:
    """The committed steps as the leader finds them, the same on every rank of its copy."""

    def __init__(self, store: CheckpointStore, ranks: Together, trainable: Trainable) -> None:
        self._store = store
        self._ranks = ranks
        self._trainable = trainable

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first."""
        return list(self._ranks.tell(self._store.steps() if self._ranks.is_leader else None))

    def protect(self, steps: Iterable[int]) -> None:
        """Keep these steps beside the last ones, however old they are, and no others."""
        if self._ranks.is_leader:
            self._store.protect(steps)

    def prune(self) -> None:
        """Remove what is neither among the last nor protected."""
        if self._ranks.is_leader:
            self._store.prune()

    def load(self, step: int) -> TrainState | None:
        """Return this rank's part of a committed state, None where that is damaged."""
        is_intact = self._ranks.is_leader and self._store.is_intact(step)
        if not self._ranks.tell(is_intact):
            return None
        return self._store.read(step, self._trainable.wanted())


class FollowingLedger:
    """What the other ranks of the leader's copy keep: nothing but their part of its checkpoints."""

    last = None

    def __init__(self, store: CheckpointStore, ranks: Together) -> None:
        self._store = store
        self._ranks = ranks

    def append(self, record: StepRecord) -> None:
        """Do nothing."""

    def commit(self, counters: Counters, trainable: Trainable, *, can_wait: bool = False) -> None:
        """Write this rank's part where the leader says.

        Raises:
            StorageFullError: there is no room; earlier checkpoints stay as they are.
            RankLostError: another rank is gone.
        """
        if (folder := self._ranks.tell()) is None:
            return  # it is there already
        state = TrainState(counters=counters, tensors=trainable.state_tensors())
        with storage_faults_of("A checkpoint", self._store.directory):
            _write_own(self._store.directory / folder, state, self._ranks, trainable)

    def roll_back(self, trainable: Trainable) -> Counters | None:
        """Put this rank's part of the last committed state back."""
        if (state := self.restore(trainable)) is None:
            return None
        trainable.restore(state.tensors, steps=state.counters.step)
        return state.counters

    def restore(self, trainable: Trainable) -> TrainState | None:
        """Return this rank's part of the state that the leader has found."""
        step = self._ranks.tell()
        return None if step is None else self._store.read(step, trainable.wanted())


def _write_own(
    folder: Path, state: TrainState, ranks: Together, trainable: Trainable
) -> dict[str, str]:
    """Write this rank's part of a state; return the hashes of all ranks' files."""
    rank, parts = ranks.group.rank, {name: w.part for name, w in trainable.wanted().items()}
    own = {
        # What every rank holds whole is written once.
        stem: {n: t for n, t in named.items() if t.numel() and (rank == 0 or n in parts)}
        for stem, named in state.tensors.items()
    }
    files = write_tensors(folder, own, parts=parts, rank=rank, ranks=ranks.group.size)
    for file in files:
        sync_path(file)
    hashes = {file.name: sha256_of(file) for file in files}
    return {name: digest for told in ranks.ask_all(hashes) for name, digest in told.items()}
