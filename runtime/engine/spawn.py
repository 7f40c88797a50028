"""Starts the engine's process. Imports next to nothing, so that it can be the first thing done."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

from mizzen.runtime.engine.stand_ins import DEVICES, has_gpu, write_stand_ins

log = logging.getLogger(__name__)

# Each thread that allocates gets an arena of its own otherwise, and none gives its pages back.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2"}


class EngineProcess:
    """A process that imports what takes seconds, and then waits for its settings on a socket."""

    def __init__(self, devices: Path = DEVICES) -> None:
        """Start it, without the libraries for GPUs where `devices` has none."""
        self.socket, theirs = socket.socketpair()
        self._files = contextlib.ExitStack()
        environment = _ENVIRONMENT | os.environ | _path_without_gpu(self._files, devices)
        with theirs:
            end = theirs.fileno()
            arguments = [str(end), str(time.monotonic())]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mizzen.runtime.engine.process", *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[end],
                env=environment,
            )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def clean_up(self) -> None:
        """Remove what only its start needs, now that each of its ranks has started.

        What is left for the end would stay in the pod's folder if this process were killed.
        """
        self._files.close()

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
        self.clean_up()


def _path_without_gpu(files: contextlib.ExitStack, devices: Path) -> dict[str, str]:
    """Return the variable that has PyTorch find stand-ins, which are there until `files` closes."""
    if has_gpu(devices):
        return {}
    try:
        folder = files.enter_context(tempfile.TemporaryDirectory(prefix="mizzen-"))
        write_stand_ins(Path(folder), sys.path)
    except OSError as error:
        log.warning("The engine takes 240 MB more, as a temporary file cannot be made: %s", error)
        return {}
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([folder, *([inherited] if inherited else [])])}
