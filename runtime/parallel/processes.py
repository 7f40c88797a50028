"""The ranks that are processes of their own in this pod, fed over pipes.

Nothing that crosses a pipe is unpickled by us. They end with the process that started them.
"""

import logging
import multiprocessing
import multiprocessing.connection
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.connect import Meeting, connect

log = logging.getLogger(__name__)

_HELLO = b"started"
_STOP_TIMEOUT_S = 5.0

Follow = Callable[..., None]
"""What ranks above 0 run: `follow(group, inbox, *arguments)`, a function of a module."""


class Inbox:
    """What rank 0 sends to this rank, in order, until it stops or dies."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __iter__(self) -> Iterator[bytes]:
        """Yield messages; waiting costs nothing."""
        while True:
            try:
                yield self._connection.recv_bytes()
            except (EOFError, OSError):
                return


class RankProcesses:
    """Some of a group's ranks, each in a process of its own."""

    def __init__(self, ranks: range, follow: Follow, arguments: tuple[Any, ...]) -> None:
        """Say which; `start` starts them."""
        self._ranks = ranks
        self._follow = follow
        self._arguments = arguments
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        # The system tells a process's exit code once: of two threads that ask at the same time
        # one would get None.
        self._asking = threading.Lock()

    @property
    def pids(self) -> list[int]:
        """The processes' ids, by rank."""
        return [process.pid for process in self._processes]

    def start(self, meeting: Meeting, timeout_s: float) -> None:
        """Start them and wait until each is about to join the others.

        Raises:
            RankLostError: one did not start.
        """
        context = multiprocessing.get_context("spawn")
        for rank in self._ranks:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_rank,
                args=(rank, meeting, theirs, self._follow, self._arguments),
                name=f"Rank {rank}",
                daemon=True,  # no rank outlives this process
            )
            process.start()
            theirs.close()  # so that its death closes the pipe
            self._processes.append(process)
            self._connections.append(ours)
        # Importing torch takes seconds and may fail; only then does a meeting make sense.
        for rank, connection in zip(self._ranks, self._connections, strict=True):
            _wait_for_hello(rank, connection, timeout_s)

    def send(self, message: bytes) -> None:
        """Give each of them the same message.

        Raises:
            RankLostError: one of them is gone.
        """
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except OSError as error:
            raise RankLostError("A rank closed its pipe.") from error

    def wait_for_end(self) -> str:
        """Block until one of them has ended; return a sentence that says which and how."""
        sentinels = {process.sentinel: process for process in self._processes}
        process = sentinels[multiprocessing.connection.wait(list(sentinels))[0]]
        with self._asking:
            process.join()
        return f"{process.name} ended with exit code {process.exitcode}."

    def stop(self) -> None:
        """End all of them: by closing their inboxes, then, if need be, by force."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            multiprocessing.connection.wait([process.sentinel], _STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End all of them at once."""
        with self._asking:
            for process in self._processes:
                if process.is_alive():
                    process.kill()
            for process in self._processes:
                process.join()


def _wait_for_hello(rank: int, connection: Connection, timeout_s: float) -> None:
    try:
        if connection.poll(timeout_s) and connection.recv_bytes() == _HELLO:
            return
    except EOFError:
        pass
    raise RankLostError(f"Rank {rank} did not start; its own log says why.")


def _run_rank(
    rank: int,
    meeting: Meeting,
    connection: Connection,
    follow: Follow,
    arguments: tuple[Any, ...],
) -> None:
    connection.send_bytes(_HELLO)
    try:
        follow(connect(rank, meeting), Inbox(connection), *arguments)
    except RankLostError as error:
        log.error("Rank %d ends: %s", rank, error)
        raise SystemExit(error.exit_code) from None
