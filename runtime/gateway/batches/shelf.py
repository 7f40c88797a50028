"""Files and batches on a volume, each owner's in a folder of its own. Plain blocking file calls.

One pod at a time runs a batch: the one that holds the lock on its marker under `open/`. A pod that
dies lets go of it, and another one goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mizzen.runtime.gateway.batches.records import Batch, StoredFile, to_fields

_STRAY_S = 600
_ORPHAN_S = 8 * 86400  # a batch writes answers for up to seven days before its files are known
_ID = re.compile(r"(file-|batch_)[0-9a-f]{32}")


class Shelf:
    """What one owner has: nobody's id leads to another's file."""

    def __init__(self, root: Path, owner: str) -> None:
        self._root = root
        self._owner = owner
        home = root / "owners" / hashlib.sha256(owner.encode()).hexdigest()[:32]
        self._files = home / "files"
        self._batches = home / "batches"

    # Files.

    def data(self, file_id: str) -> Path:
        """Where a file's content is."""
        self._files.mkdir(parents=True, exist_ok=True)
        return self._files / f"{file_id}.data"

    def put_file(self, stored: StoredFile) -> None:
        """Make a file known, once its content is there."""
        _write(self._files / f"{stored.id}.json", to_fields(stored))

    def file(self, file_id: str) -> StoredFile | None:
        """Return what is known of a file."""
        fields = _read(self._files / f"{file_id}.json") if _ID.fullmatch(file_id) else None
        return None if fields is None else StoredFile.parse(fields)

    def files(self) -> list[StoredFile]:
        """Return all files, the newest first."""
        found = [StoredFile.parse(fields) for fields in _read_all(self._files)]
        return sorted(found, key=lambda stored: (-stored.created_at_s, stored.id))

    def delete_file(self, file_id: str) -> None:
        """Forget a file, then remove its content."""
        (self._files / f"{file_id}.json").unlink(missing_ok=True)
        self.data(file_id).unlink(missing_ok=True)

    # Batches.

    def put_batch(self, batch: Batch) -> None:
        """Write down how a batch is; a new one is marked first, so that it cannot be missed."""
        marker = self._root / "open" / batch.id
        if not batch.is_ended and not marker.exists():
            _write(marker, {"owner": batch.owner})
        _write(self._batches / f"{batch.id}.json", to_fields(batch))

    def batch(self, batch_id: str) -> Batch | None:
        """Return how a batch is."""
        fields = _read(self._batches / f"{batch_id}.json") if _ID.fullmatch(batch_id) else None
        return None if fields is None else self._told(Batch.parse(fields))

    def batches(self) -> list[Batch]:
        """Return all batches, the newest first."""
        found = [self._told(Batch.parse(fields)) for fields in _read_all(self._batches)]
        return sorted(found, key=lambda batch: (-batch.created_at_s, batch.id))

    def cancel(self, batch: Batch, now_s: int) -> Batch:
        """Ask for the end of a batch; the pod that runs it sees to it."""
        _write(self._batches / f"{batch.id}.cancel", {"at": now_s})
        return self._told(batch)

    def _told(self, batch: Batch) -> Batch:
        if batch.is_ended or batch.status == "cancelling":
            return batch
        asked = _read(self._batches / f"{batch.id}.cancel")
        return batch if asked is None else batch.moved("cancelling", asked["at"])

    def delete_batch(self, batch_id: str) -> None:
        """Forget a batch that has ended."""
        for ending in ("json", "cancel"):
            (self._batches / f"{batch_id}.{ending}").unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one batch, until it is given back or this process ends."""

    batch_id: str
    owner: str
    _descriptor: int
    _marker: Path

    def is_stray(self) -> bool:
        """Whether whoever made this batch did not live to write it down."""
        return time.time() - self._marker.stat().st_mtime > _STRAY_S

    def finish(self) -> None:
        """Nobody needs to look at this batch again."""
        self._marker.unlink(missing_ok=True)

    def release(self) -> None:
        """Let others run it."""
        os.close(self._descriptor)


def open_batches(root: Path) -> list[str]:
    """Return the batches that have not ended, of all owners."""
    return sorted(path.name for path in _listed(root / "open") if _ID.fullmatch(path.name))


def claim(root: Path, batch_id: str) -> Claim | None:
    """Return the right to run a batch, None where another has it or nothing is left to do."""
    marker = root / "open" / batch_id
    try:
        descriptor = os.open(marker, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        # flock, for which Linux uses byte-range locks on NFS: it holds between nodes as well.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = json.loads(os.read(descriptor, 2**16))["owner"]
    except (BlockingIOError, ValueError):
        os.close(descriptor)
        return None
    return Claim(batch_id, owner, descriptor, marker)


def mend(path: Path) -> set[str]:
    """Return which requests a file of answers has an answer to.

    A last line that was not written to its end is cut off.
    """
    ids: set[str] = set()
    whole_bytes = 0
    with suppress(FileNotFoundError), path.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(whole_bytes)
                break
            ids.add(json.loads(line)["custom_id"])
            whole_bytes += len(line)
    return ids


def remove_expired(root: Path, *, now_s: int, keep_s: int) -> None:
    """Remove files whose time is over, and batches that ended so long ago."""
    for home in _listed(root / "owners"):
        for fields in _read_all(home / "files"):
            if fields["expires_at_s"] <= now_s:
                for ending in ("json", "data"):
                    (home / "files" / f"{fields['id']}.{ending}").unlink(missing_ok=True)
        for path in _listed(home / "files"):
            if path.suffix == ".data" and _is_orphan(path, now_s):
                path.unlink(missing_ok=True)
        for fields in _read_all(home / "batches"):
            batch = Batch.parse(fields)
            if batch.is_ended and batch.expires_at_s + keep_s <= now_s:
                Shelf(root, batch.owner).delete_batch(batch.id)


def _is_orphan(content: Path, now_s: int) -> bool:
    """Whether a file's content is of an upload that was cut off by the end of its gateway."""
    if content.with_suffix(".json").exists():
        return False
    with suppress(FileNotFoundError):
        return content.stat().st_mtime + _ORPHAN_S <= now_s
    return False


def _read_all(folder: Path) -> Iterator[dict[str, Any]]:
    for path in _listed(folder):
        if path.suffix == ".json" and (fields := _read(path)) is not None:
            yield fields


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _read(path: Path) -> dict[str, Any] | None:
    try:
        fields: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    return fields


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all, also when the node loses its power: readers are other pods.
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with draft.open("wb") as file:
        file.write(json.dumps(fields).encode())
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
