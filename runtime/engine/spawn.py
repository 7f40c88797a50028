"""Starts the engine's process. Imports next to nothing, so that it can be the first thing done."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from types import TracebackType

# Each thread that allocates gets an arena of its own otherwise, and none gives its pages back.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


class EngineProcess:
    """A process that imports what takes seconds, and then waits for its settings on a socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            end = theirs.fileno()
            arguments = [str(end), str(time.monotonic())]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mizzen.runtime.engine.process", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[end],
                env=_ENVIRONMENT | os.environ,
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Return the exit code, below zero for a signal's; None if it runs after `timeout_s`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """End it at once, stopped or not."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> "EngineProcess":
        """Have the process gone when the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self.socket.close()
