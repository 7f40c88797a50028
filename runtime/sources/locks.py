"""File locks between the processes that share a cache. The kernel lets go of a dead one's."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_POLL_S = 0.2


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock alone, waiting for as long as another has it."""
    with path.open("a+b") as file:
        # Asked again and again instead of blocking: over NFS a blocked lock is not always woken.
        while not _try_lock(file, fcntl.LOCK_EX):
            time.sleep(_POLL_S)
        yield


@contextmanager
def exclusive_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock alone if nobody has it; say whether it was so."""
    with path.open("a+b") as file:
        yield _try_lock(file, fcntl.LOCK_EX)


def shared(path: Path) -> IO[bytes]:
    """Hold the lock together with others until the returned file is closed."""
    file = path.open("a+b")
    while not _try_lock(file, fcntl.LOCK_SH):
        time.sleep(_POLL_S)
    return file


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
