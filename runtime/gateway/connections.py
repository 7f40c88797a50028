"""Ends connections that only take up room: silent ones, dribbling ones, and ones never read."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

log = logging.getLogger(__name__)

_SWEEP_S = 1.0


class Connections:
    """Knows which connections have a request, and since when the others have none."""

    def __init__(
        self,
        *,
        most: int,
        request_timeout_s: float,
        idle_timeout_s: float,
        stall_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._request_timeout_s = request_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._busy: dict[object, int] = {}
        # When a connection was first seen without a request, and how long it may be so.
        self._idle: dict[object, tuple[float, float]] = {}
        self._writing: dict[web.RequestHandler, float] = {}

    @contextmanager
    def request(self, request: web.BaseRequest) -> Iterator[None]:
        """A connection is busy while the block runs."""
        protocol = request.protocol
        self._busy[protocol] = self._busy.get(protocol, 0) + 1
        self._idle.pop(protocol, None)
        try:
            yield
        finally:
            self._busy[protocol] -= 1
            if not self._busy[protocol]:
                del self._busy[protocol]
                self._idle[protocol] = (self._clock(), self._idle_timeout_s)

    @contextmanager
    def writing(self, request: web.BaseRequest) -> Iterator[None]:
        """Something is written in the block, which takes as long as the client takes to read."""
        self._writing[request.protocol] = self._clock()
        try:
            yield
        finally:
            self._writing.pop(request.protocol, None)

    async def sweep(self, server: web.Server) -> None:
        """Look at all connections once a second, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._sweep(server)

    def _sweep(self, server: web.Server) -> None:
        now = self._clock()
        connections = server.connections
        known = set(connections)
        for gone in self._idle.keys() - known:
            del self._idle[gone]
        idle: list[tuple[float, web.RequestHandler]] = []
        for connection in connections:
            if connection in self._busy:
                continue
            # A new one has not even sent its headers, however many bytes of them have come.
            since, allowed_s = self._idle.setdefault(connection, (now, self._request_timeout_s))
            if now - since >= allowed_s:
                _abort(connection)
            else:
                idle.append((since, connection))
        if (surplus := len(connections) - self._most) > 0:
            idle.sort(key=lambda entry: entry[0])
            for _, connection in idle[:surplus]:
                _abort(connection)
        self._end_stalled(now)

    def _end_stalled(self, now: float) -> None:
        for connection, since in self._writing.items():
            if now - since >= self._stall_timeout_s:
                log.info("a client has read nothing for %g s: closed", self._stall_timeout_s)
                _abort(connection)


def _abort(connection: web.RequestHandler) -> None:
    # Not a gentle close: that would wait for a client who does not read.
    if isinstance(connection.transport, asyncio.WriteTransport):
        connection.transport.abort()
