"""The processes of a group: rank 0 is the caller, it starts the others and hears of their end.

Rank 0 sends each step as bytes over pipes; nothing that crosses one is unpickled by us. A rank
that dies takes the group with it: a model with a missing part answers nobody.
"""

import logging
import multiprocessing
import multiprocessing.connection
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.connect import Meeting, connect
from mizzen.runtime.parallel.group import RankGroup

log = logging.getLogger(__name__)

_HELLO = b"started"
_STOP_TIMEOUT_S = 5.0


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


Follow = Callable[..., None]
"""What ranks above 0 run: `follow(group, inbox, *arguments)`, a function of a module."""


class Ranks:
    """The started group, held by rank 0."""

    def __init__(
        self,
        size: int,
        follow: Follow,
        arguments: Sequence[Any] = (),
        *,
        device: str = "cpu",
        timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        on_lost: Callable[[RankLostError], None] | None = None,
    ) -> None:
        """Start ranks 1 to size - 1 and join them; with one rank, start nothing.

        Args:
            size: How many ranks, this process included.
            follow: What the others run; the group ends with the first of them to return.
            arguments: Given to `follow` after the group and the inbox.
            device: "cpu" or "cuda"; rank r uses GPU r.
            timeout_s: How long a collective waits for a silent rank.
            start_timeout_s: How long a new process may take to import what it needs.
            on_lost: Called once, from the watching thread, when a rank has died.

        Raises:
            RankLostError: a rank died or stayed away while starting.
        """
        self._on_lost = on_lost
        self._lost: RankLostError | None = None
        self._is_stopping = threading.Event()
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        self._watcher: threading.Thread | None = None
        self.group = RankGroup()
        if size > 1:
            try:
                store = tempfile.TemporaryDirectory(prefix="mizzen-ranks-")
                with store as directory:
                    meeting = Meeting(size, Path(directory), torch.device(device), timeout_s)
                    self._start(meeting, follow, tuple(arguments), start_timeout_s)
            except BaseException:
                self.stop()
                raise

    def send(self, message: bytes) -> None:
        """Give every other rank the same message.

        Raises:
            RankLostError: one of them is gone.
        """
        self.check()
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except OSError as error:
            raise self._lost or RankLostError("A rank closed its pipe.") from error

    def check(self) -> None:
        """Raise RankLostError if a rank has died."""
        if self._lost is not None:
            raise self._lost

    def stop(self) -> None:
        """End all other ranks: by closing their inboxes, then, if need be, by force."""
        self._is_stopping.set()
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_STOP_TIMEOUT_S)
        self._kill()
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()

    def _start(
        self, meeting: Meeting, follow: Follow, arguments: tuple[Any, ...], start_timeout_s: float
    ) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(1, meeting.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_rank,
                args=(rank, meeting, theirs, follow, arguments),
                name=f"Rank {rank}",
                daemon=True,  # no rank outlives this process
            )
            process.start()
            theirs.close()  # so that its death closes the pipe
            self._processes.append(process)
            self._connections.append(ours)
        # Importing torch takes seconds and may fail; only then does a meeting make sense.
        for rank in range(1, meeting.size):
            self._wait_for_hello(rank, start_timeout_s)
        self.group = connect(0, meeting)
        self._watcher = threading.Thread(target=self._watch, name="rank-watch", daemon=True)
        self._watcher.start()

    def _wait_for_hello(self, rank: int, timeout_s: float) -> None:
        connection = self._connections[rank - 1]
        try:
            if connection.poll(timeout_s) and connection.recv_bytes() == _HELLO:
                return
        except EOFError:
            pass
        raise RankLostError(f"Rank {rank} did not start; its own log says why.")

    def _watch(self) -> None:
        sentinels = {process.sentinel: process for process in self._processes}
        ended: list[Any] = multiprocessing.connection.wait(list(sentinels))
        if self._is_stopping.is_set():
            return
        process = sentinels[ended[0]]
        process.join()
        self._lost = RankLostError(f"{process.name} ended with exit code {process.exitcode}.")
        log.error("%s The group goes down.", self._lost)
        self._kill()
        # A collective of NCCL would wait for the dead for ever; gloo notices by itself.
        self.group.abort()
        if self._on_lost is not None:
            self._on_lost(self._lost)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()


def _run_rank(
    rank: int,
    meeting: Meeting,
    connection: Connection,
    follow: Follow,
    arguments: tuple[Any, ...],
) -> None:
    connection.send_bytes(_HELLO)
    group = connect(rank, meeting)
    try:
        follow(group, Inbox(connection), *arguments)
    except RankLostError as error:
        log.error("Rank %d ends: %s", rank, error)
        raise SystemExit(1) from None
