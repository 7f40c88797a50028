"""Keeps a cache below its limit: what was not used for longest goes first, what is in use never."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mizzen.runtime.sources.errors import CacheTooSmallError, StorageFullError
from mizzen.runtime.sources.integrity import MANIFEST
from mizzen.runtime.sources.locks import exclusive, exclusive_if_free
from mizzen.runtime.sources.places import Places, bytes_in

log = logging.getLogger(__name__)

GIB = 2**30
_RESERVED = ".reserved"
# Left free on the volume: other files, and what a file system needs for itself.
_SPARE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Kept:
    name: str
    size: int
    used_at: float


def make_room(places: Places, entry: str, need_bytes: int, *, limit_bytes: int | None) -> None:
    """Reserve `need_bytes` for the unfinished `entry`, removing other entries if need be.

    Raises:
        CacheTooSmallError: the limit is lower than this one entry, or than it and those in use.
        StorageFullError: the volume has no room for it.
    """
    # One at a time: two that look at the same moment would both find the same room.
    with exclusive(places.lock("room")):
        while True:
            excess = _over_limit(places, entry, need_bytes, limit_bytes)
            lack = _lack_on_volume(places, entry, need_bytes)
            if excess <= 0 and lack <= 0:
                break
            if not _remove_oldest(places, but=entry):
                raise _too_small(need_bytes, limit_bytes) if excess > 0 else _full(need_bytes, lack)
        (places.partial(entry) / _RESERVED).write_text(str(need_bytes))


def release_room(partial: Path) -> None:
    """Forget the reservation: the files themselves count from now on."""
    (partial / _RESERVED).unlink(missing_ok=True)


def _over_limit(places: Places, entry: str, need_bytes: int, limit_bytes: int | None) -> int:
    if limit_bytes is None:
        return 0
    others = sum(kept.size for kept in _others(places, but=entry))
    return others + need_bytes - limit_bytes


def _lack_on_volume(places: Places, entry: str, need_bytes: int) -> int:
    present = bytes_in(places.partial(entry))
    return need_bytes - present - (shutil.disk_usage(places.root).free - _SPARE_BYTES)


def _others(places: Places, *, but: str) -> Iterator[_Kept]:
    for folder in places.entries():
        yield _Kept(folder.name, bytes_in(folder), (folder / MANIFEST).stat().st_mtime)
    for folder in places.partials():
        if folder.name != but:
            yield _Kept(folder.name, max(bytes_in(folder), _reserved(folder)), 0.0)


def _reserved(partial: Path) -> int:
    try:
        return int((partial / _RESERVED).read_text())
    except (OSError, ValueError):
        return 0


def _remove_oldest(places: Places, *, but: str) -> bool:
    """Remove the one that was not used for longest; return whether there was one."""
    for kept in sorted(_others(places, but=but), key=lambda kept: kept.used_at):
        with exclusive_if_free(places.users(kept.name)) as unused:
            if unused:
                log.info("removing %s from the cache (%.2f GiB)", kept.name, kept.size / GIB)
                places.remove(kept.name)
                return True
    return False


def _too_small(need_bytes: int, limit_bytes: int | None) -> CacheTooSmallError:
    limit_bytes = limit_bytes or 0
    why = "" if need_bytes > limit_bytes else ", and the rest of it is models that are in use"
    return CacheTooSmallError(
        f"The model has {need_bytes / GIB:.2f} GiB and its cache may hold {limit_bytes / GIB:.2f} "
        f"GiB{why}. Raise that: --cache-gib, in a cluster spec.model.cache.maxGiB."
    )


def _full(need_bytes: int, lack_bytes: int) -> StorageFullError:
    return StorageFullError(
        f"The model has {need_bytes / GIB:.2f} GiB, for which the volume of its cache lacks "
        f"{lack_bytes / GIB:.2f} GiB. Enlarge it or name another: --cache-dir, in a cluster "
        "spec.model.cache.claim."
    )
