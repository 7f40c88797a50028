"""The served model's files: fetched before the engine starts, while the ports answer already."""

import asyncio
from pathlib import Path

from mizzen.runtime.config import ServeConfig
from mizzen.runtime.sources.address import Address
from mizzen.runtime.sources.cache import Cache
from mizzen.runtime.sources.fetch import fetch_model
from mizzen.runtime.sources.progress import LoadProgress

_GIB = 2**30


class ModelFiles:
    """Where they are on this machine, and how far they have come."""

    def __init__(self) -> None:
        self.progress = LoadProgress()
        self._cache: Cache | None = None  # holds the entry: it must not make room for another

    async def bring(self, config: ServeConfig) -> ServeConfig:
        """Return the settings with a path for a model, fetched in a thread where it is remote.

        Raises:
            SourceError: it cannot be had; the message says what to change.
            BadModelError: it is no model that may be loaded.
        """
        if (address := config.remote) is None:
            return config
        path = await asyncio.to_thread(self._fetch, address, config)
        changes = {"model": str(path), "served_model_name": config.served_name}
        return config.model_copy(update=changes)

    def _fetch(self, address: Address, config: ServeConfig) -> Path:
        limit = None if config.cache_gib is None else int(config.cache_gib * _GIB)
        self._cache = Cache(config.cache_dir, limit_bytes=limit)
        return fetch_model(address, self._cache, self.progress)
