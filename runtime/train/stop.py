"""The wish to stop: asked for by SIGTERM or `POST /yield`, seen at the next safe point."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_YIELDED = 75


class YieldRequested(Exception):
    """Raised at a safe point once somebody wants the job to stop."""


class Stop(Protocol):
    """What a job's loops look at."""

    @property
    def is_asked(self) -> bool:
        """Whether the job should stop; to look is also to show that one is alive."""
        ...

    def check(self) -> None:
        """Raise `YieldRequested` if it should: the caller stands at a safe point."""
        ...


class StopFlag:
    """One flag for all ways to ask; asking twice changes nothing."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._nothing_to_lose = False
        self._seen_at_s = time.monotonic()

    def listen_to_signals(self) -> None:
        """Let SIGTERM, and Ctrl-C in a terminal, raise the flag."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.ask())

    @property
    def is_asked(self) -> bool:
        """Whether the job should stop; to look is also to show that one is alive."""
        self._seen_at_s = time.monotonic()
        return self._asked.is_set()

    @property
    def silent_s(self) -> float:
        """Seconds since the job last looked; nobody need look where nothing can be lost."""
        return 0.0 if self._nothing_to_lose else time.monotonic() - self._seen_at_s

    @property
    def has_nothing_to_lose(self) -> bool:
        """Whether a restart would repeat what the job does now."""
        return self._nothing_to_lose

    def ask(self) -> None:
        """Ask the job to stop at its next safe point, which may be now."""
        self._asked.set()
        if self._nothing_to_lose:
            leave(EXIT_YIELDED)

    def wait(self) -> None:
        """Block until somebody asks."""
        self._asked.wait()

    def check(self) -> None:
        """Raise `YieldRequested` if the flag is up: the caller stands at a safe point."""
        if self.is_asked:
            raise YieldRequested

    @contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """While inside, a request ends the process at once.

        For stretches that may be long (loading weights, copying an artifact), change nothing a
        restart would not repeat, and offer no point at which to look.
        """
        self._nothing_to_lose = True
        try:
            if self.is_asked:
                leave(EXIT_YIELDED)
            yield
        finally:
            self._seen_at_s = time.monotonic()
            self._nothing_to_lose = False


def leave(code: int) -> None:
    """End the process now.

    The interpreter's own shutdown joins threads and tears down process groups, which was seen to
    take minutes; what had to be kept is on disk already.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
