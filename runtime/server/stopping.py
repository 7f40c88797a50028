"""How a process hears that it should stop, and waits for whatever comes first."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


async def first_of(*waits: Awaitable[object]) -> None:
    """Wait until one of `waits` is over; the coroutines among them end with it."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task, wait in zip(tasks, waits, strict=True):
            if task is not wait:
                task.cancel()


@contextmanager
def stop_signals(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT call `ask_to_stop` while the block runs."""
    loop = asyncio.get_running_loop()
    wanted = (signal.SIGTERM, signal.SIGINT)
    for each in wanted:
        loop.add_signal_handler(each, ask_to_stop)
    try:
        yield
    finally:
        for each in wanted:
            loop.remove_signal_handler(each)
