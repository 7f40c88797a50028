"""One kind of object mirrored from the API server into a sink, for as long as the process lives.

While the API server is away the sink keeps what it knew: stale endpoints serve, none do not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from aiohttp import ClientError

from mizzen.runtime.gateway.kube import GoneError, KubeError, KubeObject, KubeSource, WatchEvent

log = logging.getLogger(__name__)

_HEALTHY_S = 5.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LAST_S = 15.0


class Sink(Protocol):
    """Where a mirrored kind goes; called in order, from one task."""

    def replace(self, items: Sequence[KubeObject]) -> None:
        """Take the whole list."""
        ...

    def put(self, item: KubeObject) -> None:
        """Take a new or changed object."""
        ...

    def drop(self, item: KubeObject) -> None:
        """Forget a deleted object."""
        ...


class Reflector:
    """List once, then follow the watch; resume where it broke, list again only when told to."""

    def __init__(
        self,
        name: str,
        source: KubeSource,
        sink: Sink,
        *,
        path: str,
        query: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._source = source
        self._sink = sink
        self._path = path
        self._query = dict(query or {})
        self._clock = clock
        self._resource_version: str | None = None
        self._contact_at: float | None = None
        self.is_synced = False
        self.last_error: str | None = None

    def contact_age_s(self) -> float | None:
        """Seconds since the API server last said something, None before the first time.

        A quiet watch gets a bookmark about once a minute.
        """
        return None if self._contact_at is None else self._clock() - self._contact_at

    async def run(self) -> None:
        """Mirror until cancelled."""
        failures = 0
        while True:
            started_at = self._clock()
            try:
                if self._resource_version is None:
                    await self._list()
                await self._follow()
            except GoneError:
                log.info("%s: the watch is too old, listing again", self.name)
                self._resource_version = None
            except (KubeError, ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
                self._note(error, first=failures == 0)
            # A server that ends every watch at once is backed off from like one that fails.
            failures = 0 if self._clock() - started_at > _HEALTHY_S else failures + 1
            await asyncio.sleep(_backoff_s(failures))

    async def _list(self) -> None:
        listing = await self._source.list_all(self._path, self._query)
        self._sink.replace(listing.items)
        self._resource_version = listing.resource_version
        self._contact_at = self._clock()
        self.is_synced = True

    async def _follow(self) -> None:
        assert self._resource_version is not None
        async with self._source.watch(self._path, self._query, self._resource_version) as events:
            self._contact_at = self._clock()
            self.last_error = None
            async for event in events:
                self._take(event)

    def _take(self, event: WatchEvent) -> None:
        self._resource_version = event.resource_version
        self._contact_at = self._clock()
        if event.kind in ("ADDED", "MODIFIED"):
            self._sink.put(event.item)
        elif event.kind == "DELETED":
            self._sink.drop(event.item)

    def _note(self, error: Exception, *, first: bool) -> None:
        text = str(error) or type(error).__name__
        # The first failure of a row and every new reason; a server that is away fills no log.
        if first or text != self.last_error:
            log.warning("%s: cannot watch (%s); keeping what is known", self.name, text)
        self.last_error = text


def _backoff_s(failures: int) -> float:
    longest = min(_BACKOFF_LAST_S, _BACKOFF_FIRST_S * 2.0 ** min(failures, 10))
    return random.uniform(longest / 2, longest)
