"""How a process begins to log, hears that it should stop, and waits for what comes first."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


def set_up_logging() -> None:
    """Log to standard error, one line an event."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


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
