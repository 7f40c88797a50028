"""Where images are built: storage of our own, so that nobody else's is touched or cleaned."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hack.cluster.host import attempt
from hack.cluster.places import cache_root
from hack.cluster.progress import say


def root() -> Path:
    """Return the folder of layers and images."""
    return cache_root() / "images"


def buildah(*arguments: str | Path) -> list[str]:
    """Return a buildah command that works in this storage."""
    # What is mounted where has to be forgotten at a restart of the machine, as /run is.
    mounts = Path("/run/mizzen") / hashlib.sha256(bytes(root())).hexdigest()[:12]
    return [str(part) for part in ("buildah", "--root", root(), "--runroot", mounts, *arguments)]


@contextmanager
def alone() -> Iterator[None]:
    """Hold the storage while building; clear away what an interrupted build has left in it."""
    with _lock() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Waiting for another build of images")
            fcntl.flock(lock, fcntl.LOCK_EX)
        attempt(buildah("rm", "--all"))
        yield


def release(*, purge: bool) -> None:
    """Unmount what interrupted builds have left, and remove all images where asked to.

    Nothing happens while a build is at work.
    """
    with _lock() as lock, suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        attempt(buildah("rm", "--all"))
        if purge:
            attempt(buildah("rmi", "--all", "--force"))


def _lock() -> IO[str]:
    root().mkdir(parents=True, exist_ok=True)
    return (root().parent / "images.lock").open("w")
