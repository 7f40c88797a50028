"""Carries outputs from the loop's thread to the event loops that wait for them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mizzen.runtime.engine.api import TokenOutput

Item = TokenOutput | Exception


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Where one request's outputs go, in order: `deliver` is called on the event loop."""

    loop: asyncio.AbstractEventLoop
    deliver: Callable[[Item], None]


class Outbox:
    """Collects a step's outputs and wakes each event loop once, not once per token."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Item]]] = {}

    def put(self, stream: Stream, item: Item) -> None:
        """Add an output; it is seen after `flush`."""
        self._items.setdefault(stream.loop, []).append((stream, item))

    def flush(self) -> None:
        """Hand everything over."""
        for loop, items in self._items.items():
            _call_soon(loop, partial(_deliver, items))
        self._items = {}


def _deliver(items: list[tuple[Stream, Item]]) -> None:
    for stream, item in items:
        stream.deliver(item)


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():  # a closed loop has nobody left who waits
            raise
