"""A group as rank 0 holds it: starts the ranks beside it, meets those of other pods, tells all.

A rank that dies or falls silent takes the group with it: a model with a missing part answers
nobody.
"""

import json
import logging
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.connect import Meeting, connect, open_store
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.line import END, SERVING, Line
from mizzen.runtime.parallel.nodes import Nodes, meet_followers
from mizzen.runtime.parallel.processes import Follow, RankProcesses

log = logging.getLogger(__name__)


class Ranks:
    """The started group, held by rank 0."""

    def __init__(
        self,
        size: int,
        follow: Follow,
        arguments: Sequence[Any] = (),
        *,
        stages: int = 1,
        device: str = "cpu",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
        nodes: Nodes | None = None,
        agreement: str = "",
    ) -> None:
        """Start the other ranks of this pod and join all of the group; one rank starts nothing.

        Args:
            size: How many ranks, this process included.
            follow: What the others run; the group ends with the first of them to return.
            arguments: Given to `follow` after the group and the inbox.
            stages: Into how many the model is cut; each has `size / stages` of the ranks.
            device: "cpu" or "cuda"; the n-th rank of a pod uses its GPU n.
            timeout_s: How long a collective waits for a silent rank once all of them serve.
            start_timeout_s: How long a new process may take to import what it needs, and then to
                read its weights while the others wait in a collective.
            nodes: The group's pods, where there are several.
            agreement: What all of them must have been started with.

        Raises:
            RankLostError: a rank died or stayed away while starting.
        """
        self.size = size
        self.group = RankGroup()  # of rank 0's stage
        self._timeout_s = timeout_s
        self._lost: RankLostError | None = None
        self._on_lost: Callable[[RankLostError], None] | None = None
        self._state = threading.Lock()
        self._is_stopping = False
        self._lines: list[Line] = []
        own = size // (nodes.count if nodes else 1)
        self._processes = RankProcesses(range(1, own), follow, tuple(arguments))
        if size == 1:
            return
        try:
            with tempfile.TemporaryDirectory(prefix="mizzen-ranks-") as directory:
                meeting = Meeting(
                    size=size,
                    stages=stages,
                    store=Path(directory) / "store",
                    device=torch.device(device),
                    timeout_s=timeout_s,
                    start_timeout_s=start_timeout_s,
                )
                if nodes:
                    meeting = self._meet(nodes, agreement, meeting)
                self._processes.start(meeting, start_timeout_s)
                self._wait_for_pods()
                self.group = connect(0, meeting)
            self._watch()
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """The ids of this pod's other ranks."""
        return self._processes.pids

    def send(self, message: bytes) -> None:
        """Give every other rank the same message.

        Raises:
            RankLostError: one of them is gone.
        """
        self.check()
        try:
            for line in self._lines:
                line.send(message)
            self._processes.send(message)
        except RankLostError as error:
            raise self._lost or error from error

    def check(self) -> None:
        """Raise RankLostError if a rank has died."""
        if self._lost is not None:
            raise self._lost

    def serve(self, on_lost: Callable[[RankLostError], None]) -> None:
        """Say that all are warm: from now on a silence of seconds is the group's end.

        Args:
            on_lost: Called once, from a watching thread, when a rank is lost.
        """
        self.group.wait_at_most(self._timeout_s)
        for line in self._lines:
            line.expect_life()
            line.send(b"", SERVING)
        with self._state:
            self._on_lost = on_lost
            lost = self._lost
        if lost:
            on_lost(lost)

    def stop(self) -> None:
        """End all other ranks."""
        with self._state:
            self._is_stopping = True
        for line in self._lines:
            line.end()
        self._processes.stop()

    def _meet(self, nodes: Nodes, agreement: str, meeting: Meeting) -> Meeting:
        """Wait for the other pods and tell them where the ranks meet."""
        self._lines = meet_followers(nodes, agreement)
        address = self._lines[0].own_address
        self._store = open_store(address, meeting.timeout_s)
        for line in self._lines:
            line.send(json.dumps([address, self._store.port]).encode())
        return replace(meeting, store=(address, self._store.port), address=address)

    def _wait_for_pods(self) -> None:
        for line in self._lines:
            line.receive()  # that its ranks have started

    def _watch(self) -> None:
        waits = [line_end(line) for line in self._lines]
        if self._processes.pids:
            waits.append(self._processes.wait_for_end)
        for wait in waits:
            threading.Thread(target=self._watch_one, args=(wait,), daemon=True).start()

    def _watch_one(self, wait: Callable[[], str]) -> None:
        error = RankLostError(wait())
        with self._state:
            if self._is_stopping or self._lost:
                return
            self._lost, on_lost = error, self._on_lost
        log.error("%s The group goes down.", error)
        if on_lost:
            on_lost(error)  # first of all: nobody may be sent here any more
        self._processes.kill()
        for line in self._lines:
            line.close()
        # A collective of NCCL would wait for the dead for ever. One of gloo ends with their
        # connections; where these stay, as those of a stopped process do, it runs into its limit.
        self.group.abort()


def line_end(line: Line) -> Callable[[], str]:
    """Return what waits for the line's end and says how it came."""

    def wait() -> str:
        try:
            kind, _ = line.receive()
        except RankLostError as error:
            return str(error)
        return f"{line.peer} left the group." if kind == END else f"{line.peer} spoke unasked."

    return wait
