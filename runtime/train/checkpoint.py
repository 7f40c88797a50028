"""A job's state on disk: committed as a whole or not at all.

A checkpoint is a folder `step-00000010` with `manifest.json`, which holds the counters and the
hashes of all other files. The folder is filled under another name and renamed when every byte is
on the disk, so whatever bears the final name was complete once; a hash that no longer fits means
damage, and the one before is taken. Our loop fills it with safetensors files; their tensors are
named like the model's parameters, and what is part of one says so (`parts.py`): nothing depends on
how many ranks wrote them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.train.durable import sha256_of, storage_faults_of, sync_path
from mizzen.runtime.train.errors import (
    BaseModelChangedError,
    CheckpointDamagedError,
    CheckpointMismatchError,
    StorageFullError,
)
from mizzen.runtime.train.parts import Wanted, files_by_kind, read_tensors, write_tensors

log = logging.getLogger(__name__)

_COMMITTED = re.compile(r"^step-(\d{8})$")
PARTIAL_PREFIX = ".partial-"
_MANIFEST = "manifest.json"
_FORMAT = 1

# Fills a checkpoint's folder; returns the hashes of those files that are on the disk already.
Fill = Callable[[Path], Mapping[str, str] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Where a job stands. The sample order and the random numbers follow from these."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    trained_ms: int = 0  # of steps, by the leader's clock; nothing but the budget asks
    skipped: int = 0  # of the samples, those whose gradient was not finite


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Everything a job needs to go on: groups of named tensors, and its counters."""

    counters: Counters
    tensors: Mapping[str, Mapping[str, Tensor]]  # file stem -> name -> tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint that is safely on disk."""

    step: int
    committed_at: str  # RFC 3339, UTC
    path: Path


class CheckpointStore:
    """The checkpoints of one job, in one folder.

    `fingerprint` says what the states belong to (settings, data), `base` which base model; a
    checkpoint with another one is an error and not a reason to start again from nothing.
    """

    def __init__(
        self, directory: Path, *, fingerprint: str, base: str, generation: int, keep: int
    ) -> None:
        self.directory = directory
        self._fingerprint = fingerprint
        self._base = base
        self._generation = generation
        self._keep = keep
        self._protected: frozenset[int] = frozenset()

    def commit(self, state: TrainState) -> Committed:
        """Write a state's tensors; as `commit_files` otherwise."""

        def fill(folder: Path) -> None:
            write_tensors(folder, state.tensors)

        return self.commit_files(state.counters, fill, need_bytes=bytes_of(state))

    def find(self, step: int) -> Committed | None:
        """Return what is committed of a step."""
        path = self._path(step)
        return _read_committed(path) if path.exists() else None

    def commit_files(self, counters: Counters, fill: Fill, *, need_bytes: int) -> Committed:
        """Let `fill` write a state into a folder; when this returns, a power cut cannot undo it.

        A step that is already committed is not written twice: the same step is the same state.

        Raises:
            StorageFullError: there is no room; earlier checkpoints stay as they are.
        """
        if (known := self.find(counters.step)) is not None:
            return known
        final = self._path(counters.step)
        partial = self.directory / f"{PARTIAL_PREFIX}{final.name}"
        committed_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            with storage_faults_of("A checkpoint", self.directory, need_bytes=need_bytes):
                self._check_room(need_bytes)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                self._seal(partial, counters, committed_at, fill(partial) or {})
                partial.rename(final)
                sync_path(self.directory)
        except (StorageFullError, RankLostError):
            # What we half wrote must not be what keeps the volume full.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.prune()
        return Committed(step=counters.step, committed_at=committed_at, path=final)

    def restore(self) -> tuple[Committed, TrainState] | None:
        """Return the newest undamaged state; as `find_newest` otherwise."""
        newest = self.find_newest()
        return None if newest is None else (newest[0], self.read(newest[0].step))

    def find_newest(self) -> tuple[Committed, Counters] | None:
        """Return the newest undamaged checkpoint, or None where there is none yet.

        What a killed process left half-written is removed, and so is what is damaged: a later
        commit of the same step needs the name.

        Raises:
            CheckpointMismatchError: the newest state belongs to other settings or data.
            BaseModelChangedError: it belongs to another base model.
        """
        self._remove_partials()
        for path in reversed(self._committed_paths()):
            manifest = _intact_manifest(path)
            if manifest is None:
                log.warning("Checkpoint %s is damaged; taking the one before it.", path.name)
                shutil.rmtree(path)
                continue
            self._check_fingerprint(path, str(manifest["fingerprint"]))
            self._check_base(path, manifest.get("base"))
            return _read_committed(path), Counters(**manifest["counters"])
        return None

    def read(self, step: int, wanted: Mapping[str, Wanted] | None = None) -> TrainState:
        """Return a state that is whole, of the wanted tensors that part alone.

        Raises:
            TensorsDifferError: its tensors are not those that are wanted.
        """
        manifest = _read_manifest(self._path(step))
        kinds = files_by_kind(self._path(step), manifest["sha256"])
        tensors = {kind: dict(read_tensors(files, wanted or {})) for kind, files in kinds.items()}
        return TrainState(counters=Counters(**manifest["counters"]), tensors=tensors)

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first."""
        return [_step_of(path) for path in self._committed_paths()]

    def protect(self, steps: Iterable[int]) -> None:
        """Keep these steps beside the last ones, however old they are, and no others."""
        self._protected = frozenset(steps)

    def is_intact(self, step: int) -> bool:
        """Whether a state is there, byte for byte as it was committed."""
        return _intact_manifest(self._path(step)) is not None

    def load(self, step: int) -> TrainState | None:
        """Return one committed state, None where it is damaged."""
        return self.read(step) if self.is_intact(step) else None

    def tensors(self, step: int, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield a committed state's tensors of one kind, whole, one after the other.

        Raises:
            CheckpointDamagedError: there is no such state any more, or not as it was committed.
        """
        manifest = _intact_manifest(self._path(step))
        if manifest is None:
            raise CheckpointDamagedError(self._path(step))
        return read_tensors(files_by_kind(self._path(step), manifest["sha256"])[kind], {})

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _seal(
        self, partial: Path, counters: Counters, committed_at: str, sealed: Mapping[str, str]
    ) -> None:
        """Put everything in the folder on the disk, and the manifest beside it."""
        hashes = dict(sealed)
        for path in sorted(partial.rglob("*")):
            if (name := path.relative_to(partial).as_posix()) not in sealed:
                sync_path(path)
                if path.is_file():
                    hashes[name] = sha256_of(path)
        manifest = {
            "format": _FORMAT,
            "counters": asdict(counters),
            "generation": self._generation,
            "fingerprint": self._fingerprint,
            "base": self._base,
            "committed_at": committed_at,
            "sha256": hashes,
        }
        with (partial / _MANIFEST).open("w") as file_:
            json.dump(manifest, file_, indent=1)
            file_.flush()
            os.fsync(file_.fileno())
        sync_path(partial)

    def _check_room(self, need: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.directory).free < need:
            raise StorageFullError(
                "A checkpoint", directory=self.directory, need_mib=-(-need // 2**20)
            )

    def _check_fingerprint(self, path: Path, found: str) -> None:
        if found != self._fingerprint:
            raise CheckpointMismatchError(
                f"The checkpoint {path.name} in {self.directory} was made with other settings or "
                "data. Restore them, or give the job a new name to start afresh."
            )

    def _check_base(self, path: Path, found: str | None) -> None:
        # Checkpoints of earlier versions do not say.
        if found not in (None, self._base):
            raise BaseModelChangedError(
                f"The base model's files have changed since {path.name} was committed in "
                f"{self.directory}. Put the former ones back, or give the job a new name to start "
                "afresh."
            )

    def _committed_paths(self) -> list[Path]:
        """Return the committed folders, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _COMMITTED.match(path.name))

    def prune(self) -> None:
        """Remove what is neither among the last nor protected."""
        old = self._committed_paths()[: -self._keep]
        for path in (path for path in old if _step_of(path) not in self._protected):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_partials(self) -> None:
        if self.directory.is_dir():
            for path in self.directory.glob(f"{PARTIAL_PREFIX}*"):
                shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def bytes_of(state: TrainState) -> int:
    """Return how much room a state's files take."""
    return sum(t.nbytes for group in state.tensors.values() for t in group.values())


def _read_manifest(path: Path) -> dict:  # type: ignore[type-arg]
    return dict(json.loads((path / _MANIFEST).read_bytes()))


def _read_committed(path: Path) -> Committed:
    manifest = _read_manifest(path)
    return Committed(
        step=manifest["counters"]["step"], committed_at=manifest["committed_at"], path=path
    )


def _intact_manifest(path: Path) -> dict | None:  # type: ignore[type-arg]
    """Return a checkpoint's manifest if every byte is as it was committed."""
    try:
        manifest = _read_manifest(path)
        hashes: dict[str, str] = manifest["sha256"]
        is_intact = all(sha256_of(path / name) == digest for name, digest in hashes.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return manifest if is_intact else None
