"""A model's source becomes a path on this machine."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mizzen.runtime.sources.address import Address, HubAddress
from mizzen.runtime.sources.cache import Cache
from mizzen.runtime.sources.errors import SourceNotCachedError, SourceUnreachableError
from mizzen.runtime.sources.progress import LoadProgress, Stage
from mizzen.runtime.sources.remote import Listing, Remote

log = logging.getLogger(__name__)


def fetch_model(address: Address, cache: Cache, progress: LoadProgress) -> Path:
    """Return the folder or the `.gguf` file that `address` names, brought here if need be.

    Raises:
        SourceError: it cannot be had; the message says what to change.
        BadModelError: it is no model that may be loaded.
    """
    progress.begin(Stage.LISTING)
    try:
        remote = None if is_offline() else open_remote(address)
        listing = _what_it_means(address, remote, cache)
    finally:
        progress.end()
    folder = cache.provide(listing, remote, progress)
    return folder / listing.only_file if listing.only_file else folder


def is_offline() -> bool:
    """Whether the environment forbids the network, by the variable that hub clients know."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def open_remote(address: Address) -> Remote:
    """Return the client of the place that keeps the model."""
    # Imported only for their own schemes: each takes a noticeable part of a start.
    if isinstance(address, HubAddress):
        from mizzen.runtime.sources.hub import Hub  # noqa: PLC0415

        return Hub(address)
    from mizzen.runtime.sources.s3 import Bucket  # noqa: PLC0415

    return Bucket(address)


def _what_it_means(address: Address, remote: Remote | None, cache: Cache) -> Listing:
    known = cache.recall(str(address))
    if remote is None:
        if known is None:
            raise SourceNotCachedError(
                f"HF_HUB_OFFLINE is set and {address} was never fetched to this cache. Unset it, "
                "or name a cache that has the model."
            )
        return known
    try:
        listing = remote.list_files()
    except SourceUnreachableError as error:
        if known is None:
            raise
        # A hub that is away for an hour must not keep a replica from starting again.
        log.warning("%s Going on with what the cache has of %s.", error, known.revision)
        return known
    cache.remember(listing)
    return listing
