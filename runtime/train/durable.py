"""Files that are either wholly there or not at all, and still there after a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from mizzen.runtime.train.errors import StorageFullError, StorageNotWritableError

# A quota and a file-size limit are walls of the same kind as a full disk.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_READ_BYTES = 4 * 1024 * 1024


def sync_path(path: Path) -> None:
    """Force a file's content, or a folder's list of names, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Replace a file by `content` in one step; a crash leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_path(path.parent)


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def storage_faults_of(what: str, directory: Path, *, need_bytes: int = 0) -> Iterator[None]:
    """Turn a full or forbidden volume into an error that says what to do.

    Raises:
        StorageFullError: no room is left.
        StorageNotWritableError: we may not write there.
    """
    need_mib = -(-need_bytes // 2**20) or None
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFullError(what, directory=directory, need_mib=need_mib) from error
        if error.errno in _REFUSED:
            raise StorageNotWritableError(
                f"{what} cannot be written to {directory} ({error.strerror}). "
                "Give uid 65532 write access to the claim, or set another claim."
            ) from error
        raise
    except RuntimeError as error:
        # torch.save says no more than that its archive could not be written.
        if "inline_container.cc" in str(error):
            raise StorageFullError(what, directory=directory, need_mib=need_mib) from error
        raise
    except SafetensorError as error:
        # The library reports an I/O fault as text only: "I/O error: ... (os error 28)".
        if any(f"(os error {number})" in str(error) for number in FULL):
            raise StorageFullError(what, directory=directory, need_mib=need_mib) from error
        raise
