"""New weights asked for over HTTP: who asks for the same ones again follows what is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

_Mark = tuple[Path, tuple[tuple[str, int, int], ...]]


class WeightSwaps:
    """The last swap that was asked for. The engine makes them one after the other."""

    def __init__(self, load: Callable[[Path], Awaitable[None]]) -> None:
        self._load = load
        self._mark: _Mark | None = None
        self._swap: asyncio.Task[None] | None = None

    async def ask(self, path: Path) -> None:
        """Have these weights served, and wait for it; as long as they are, there is nothing to do.

        Whoever stops waiting does not stop the swap: half of it may be done.

        Raises:
            MizzenError: the engine cannot take them; what is served stays as it was.
        """
        mark = await asyncio.to_thread(_mark_of, path)
        if self._swap is None or mark != self._mark or _has_failed(self._swap):
            self._mark, self._swap = mark, asyncio.create_task(self._run(path))
        await asyncio.shield(self._swap)

    async def _run(self, path: Path) -> None:
        await self._load(path)


def _mark_of(path: Path) -> _Mark:
    """Return what differs where other weights were put in the same place."""
    files = ((file.name, file.stat()) for file in sorted(path.iterdir()) if file.is_file())
    return path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def _has_failed(swap: asyncio.Task[None]) -> bool:
    return swap.done() and (swap.cancelled() or swap.exception() is not None)
