"""Models kept on a node's disk: fetched by one process, used by all, never half there.

An entry is a folder named by exactly what it holds. It is fetched under a name of its own, hashed,
and becomes an entry by one rename; so whatever is interrupted leaves something to go on from. Files
are changed by nobody: a damaged one is thrown away and fetched again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

from mizzen.runtime.sources.errors import (
    ChecksumMismatchError,
    SourceNotCachedError,
    StorageFullError,
    StorageNotWritableError,
)
from mizzen.runtime.sources.integrity import (
    MANIFEST,
    damaged_files,
    matches,
    needs_hashing,
    read_manifest,
    write_manifest,
)
from mizzen.runtime.sources.locks import exclusive, shared
from mizzen.runtime.sources.places import Places, bytes_in
from mizzen.runtime.sources.progress import LoadProgress, Stage
from mizzen.runtime.sources.remote import Listing, Remote, RemoteFile
from mizzen.runtime.sources.room import make_room, release_room

log = logging.getLogger(__name__)

_FILES_AT_ONCE = 4
_ATTEMPTS = 2  # a second time only because of a wrong checksum
_UNFINISHED = ".part"


class Cache:
    """One folder of models, shared with other processes and bounded in size."""

    def __init__(self, root: Path, *, limit_bytes: int | None = None) -> None:
        self._places = Places(root)
        self._limit_bytes = limit_bytes
        self._in_use: list[ExitStack] = []
        self._places.prepare()

    def remember(self, listing: Listing) -> None:
        """Note what an address means now, for a start without the network."""
        place = self._places.revision(_key(listing.address))
        # Under a name of its own: in their pods, replicas all have the same process id.
        unfinished = place.with_suffix(f".{uuid.uuid4().hex}")
        try:
            unfinished.write_text(json.dumps(listing.to_json()))
            unfinished.rename(place)
        except OSError as error:
            # A full volume must not keep a model that is on it from being served.
            log.warning("not noted what %s is at now: %s", listing.address, error)
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def recall(self, address: str) -> Listing | None:
        """Return what an address meant the last time, None where it was never asked."""
        try:
            document = json.loads(self._places.revision(_key(address)).read_text())
            return Listing.from_json(document)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def provide(self, listing: Listing, remote: Remote | None, progress: LoadProgress) -> Path:
        """Return the folder with the listing's files, fetching what is not there.

        It stays for as long as this cache object lives: nobody removes it to make room.

        Raises:
            SourceError: the files cannot be had, or not be kept.
        """
        entry = listing.entry
        partial, folder = self._places.partial(entry), self._places.model(entry)
        with ExitStack() as use:
            use.enter_context(shared(self._places.users(entry)))
            use.callback(progress.end)
            progress.begin(Stage.WAITING, listing.size, lambda: bytes_in(partial))
            try:
                with exclusive(self._places.lock(entry)):
                    if not self._is_whole(entry, listing, progress):
                        self._fetch(listing, remote, progress)
            except OSError as error:
                raise _storage_error(error) from error
            progress.end()
            self._in_use.append(use.pop_all())  # only of a model that is there
        os.utime(folder / MANIFEST)  # used now: the last to be removed for others
        return folder

    def _is_whole(self, entry: str, listing: Listing, progress: LoadProgress) -> bool:
        """Check an entry; one with damaged files becomes a partial one without them."""
        folder = self._places.model(entry)
        if (kept := read_manifest(folder)) is None:
            return False
        hashed = _Counter()
        if needs_hashing(folder, kept):
            progress.begin(Stage.CHECKING, listing.size, hashed.value)
        damaged = damaged_files(folder, kept, hashed.add)
        if not damaged:
            return True
        log.warning("%s of %s changed on disk and are fetched again", damaged, listing.address)
        # The manifest first: without it the folder counts for nothing, wherever this is cut short.
        for name in [MANIFEST, *damaged]:
            (folder / name).unlink(missing_ok=True)
        self._places.remove_partial(entry)
        folder.rename(self._places.partial(entry))
        return False

    def _fetch(self, listing: Listing, remote: Remote | None, progress: LoadProgress) -> None:
        if remote is None:
            raise SourceNotCachedError(
                f"{listing.address} is not in the cache and HF_HUB_OFFLINE forbids to fetch it. "
                "Unset it, or name a cache that has the model."
            )
        entry = listing.entry
        partial, folder = self._places.partial(entry), self._places.model(entry)
        partial.mkdir(exist_ok=True)
        make_room(self._places, entry, listing.size, limit_bytes=self._limit_bytes)
        log.info("fetching %s at %s", listing.address, listing.revision or "its present state")
        progress.begin(Stage.DOWNLOADING, listing.size, lambda: bytes_in(partial))
        self._fetch_files(listing, remote, partial)
        hashed = _Counter()
        progress.begin(Stage.CHECKING, listing.size, hashed.value)
        release_room(partial)
        write_manifest(partial, listing.files, hashed.add)
        self._places.remove_model(entry)
        partial.rename(folder)

    def _fetch_files(self, listing: Listing, remote: Remote, partial: Path) -> None:
        def fetch(file: RemoteFile) -> bool:
            return _fetch_file(file, listing, remote, partial)

        missing = list(listing.files)
        for _ in range(_ATTEMPTS):
            with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
                arrived = zip(missing, pool.map(fetch, missing), strict=True)
                missing = [file for file, is_right in arrived if not is_right]
            if not missing:
                return
        names = ", ".join(file.name for file in missing)
        raise ChecksumMismatchError(
            f"What arrives of {listing.address} is not what was announced ({names}), also at the "
            "second attempt. Look for a proxy in between, or for a damaged upload."
        )


class _Counter:
    """Bytes done by several threads; a sum that is late by one block harms nobody."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count

    def value(self) -> int:
        return self._bytes


def _fetch_file(file: RemoteFile, listing: Listing, remote: Remote, partial: Path) -> bool:
    """Bring one file; return whether it is the one that was announced."""
    whole, unfinished = partial / file.name, partial / f"{file.name}{_UNFINISHED}"
    if whole.exists() and matches(whole, file):
        return True
    unfinished.touch()
    if unfinished.stat().st_size > file.size:
        os.truncate(unfinished, 0)  # not what is wanted: a rest of something else
    if unfinished.stat().st_size < file.size:
        remote.fetch(file, listing, unfinished)
    if not matches(unfinished, file):
        log.warning("%s of %s arrived with a wrong checksum", file.name, listing.address)
        unfinished.unlink()
        return False
    unfinished.rename(whole)
    return True


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:32]


def _storage_error(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError(
            "The volume of the model cache is full. Enlarge it or name another: --cache-dir, in a "
            "cluster spec.model.cache.claim."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageNotWritableError(
            f"The model cache cannot be written to ({error.strerror}: {error.filename}). Give a "
            "folder that can: --cache-dir, in a cluster spec.model.cache.claim."
        )
    return error
