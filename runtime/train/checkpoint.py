"""A job's state on disk: committed as a whole or not at all.

A checkpoint is a folder `step-00000010` with `manifest.json`, which holds the counters and the
hashes of all other files. The folder is filled under another name and renamed when every byte is
on the disk, so whatever bears the final name was complete once; a hash that no longer fits means
damage, and the one before is taken. Our loop fills it with safetensors files; their tensors are
named like the model's parameters and are whole: nothing depends on how many ranks wrote them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from mizzen.runtime.train.durable import sha256_of, storage_faults_of, sync_path
from mizzen.runtime.train.errors import (
    BaseModelChangedError,
    CheckpointMismatchError,
    StorageFullError,
)

log = logging.getLogger(__name__)

_COMMITTED = re.compile(r"^step-(\d{8})$")
PARTIAL_PREFIX = ".partial-"
_MANIFEST = "manifest.json"
_SUFFIX = ".safetensors"
_FORMAT = 1


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
        need = sum(t.nbytes for group in state.tensors.values() for t in group.values())
        return self.commit_files(
            state.counters, lambda folder: _write_tensors(folder, state.tensors), need_bytes=need
        )

    def commit_files(
        self, counters: Counters, fill: Callable[[Path], None], *, need_bytes: int
    ) -> Committed:
        """Let `fill` write a state into a folder; when this returns, a power cut cannot undo it.

        A step that is already committed is not written twice: the same step is the same state.

        Raises:
            StorageFullError: there is no room; earlier checkpoints stay as they are.
        """
        name = f"step-{counters.step:08d}"
        if (self.directory / name).exists():
            return _read_committed(self.directory / name)
        partial = self.directory / f"{PARTIAL_PREFIX}{name}"
        committed_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            with storage_faults_of("A checkpoint", self.directory, need_bytes=need_bytes):
                self._check_room(need_bytes)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                fill(partial)
                self._seal(partial, counters, committed_at)
                partial.rename(self.directory / name)
                sync_path(self.directory)
        except StorageFullError:
            # What we half wrote must not be what keeps the volume full.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.prune()
        return Committed(step=counters.step, committed_at=committed_at, path=self.directory / name)

    def restore(self) -> tuple[Committed, TrainState] | None:
        """Return the newest undamaged state; as `find_newest` otherwise."""
        newest = self.find_newest()
        return None if newest is None else (newest[0], _read_state(newest[0].path))

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

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first."""
        return [_step_of(path) for path in self._committed_paths()]

    def protect(self, steps: Iterable[int]) -> None:
        """Keep these steps beside the last ones, however old they are, and no others."""
        self._protected = frozenset(steps)

    def load(self, step: int) -> TrainState | None:
        """Return one committed state, None where it is damaged."""
        path = self.directory / f"step-{step:08d}"
        return None if _intact_manifest(path) is None else _read_state(path)

    def _seal(self, partial: Path, counters: Counters, committed_at: str) -> None:
        """Put everything in the folder on the disk, and the manifest beside it."""
        hashes = {}
        for path in sorted(partial.rglob("*")):
            sync_path(path)
            if path.is_file():
                hashes[path.relative_to(partial).as_posix()] = sha256_of(path)
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


def _write_tensors(folder: Path, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    for stem, tensors in groups.items():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / f"{stem}{_SUFFIX}")


def _read_state(path: Path) -> TrainState:
    manifest = _read_manifest(path)
    files = [name for name in manifest["sha256"] if name.endswith(_SUFFIX)]
    tensors = {name.removesuffix(_SUFFIX): load_file(path / name) for name in files}
    return TrainState(counters=Counters(**manifest["counters"]), tensors=tensors)


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
