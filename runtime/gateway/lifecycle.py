"""Whether the gateway may be sent requests: first lists read, and not shutting down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from mizzen.runtime.gateway.reflector import Reflector


@dataclass(slots=True)
class Lifecycle:
    """Shared by the request side, which closes connections, and the health side, which reports."""

    reflectors: list[Reflector] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    is_draining: bool = False
    _open_requests: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def open_request(self) -> Iterator[None]:
        """Count one request while the block runs."""
        self._open_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open_requests -= 1
            if not self._open_requests:
                self._idle.set()

    async def wait_until_idle(self, timeout_s: float) -> int:
        """Return when no request is open, or after `timeout_s`; say how many still are."""
        if self._open_requests:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._idle.wait()
        return self._open_requests

    def is_synced(self) -> bool:
        """Whether every kind was listed once; true at once where nothing is watched."""
        return all(reflector.is_synced for reflector in self.reflectors)

    def watches(self) -> dict[str, dict[str, object]]:
        """What is known of every watch, for people."""
        return {
            reflector.name: {
                "synced": reflector.is_synced,
                "contactAgeSeconds": _rounded(reflector.contact_age_s()),
                "lastError": reflector.last_error,
            }
            for reflector in self.reflectors
        }

    def broken(self) -> str | None:
        """Name a watch that has ended, which only a bug can make happen."""
        for reflector, task in zip(self.reflectors, self.tasks, strict=False):
            if task.done():
                return reflector.name
        return None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
