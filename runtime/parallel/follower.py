"""A pod that follows another: it starts its ranks, and passes on to them what the leader says.

The ranks are processes of their own, so that one that hangs keeps nobody from noticing.
"""

import json
import threading
from collections.abc import Sequence
from typing import Any

import torch

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.connect import Meeting
from mizzen.runtime.parallel.line import MESSAGE, SERVING, Line
from mizzen.runtime.parallel.nodes import Nodes
from mizzen.runtime.parallel.processes import Follow, RankProcesses


class Follower:
    """The ranks of this pod, from the leader's first word to its last."""

    def __init__(
        self,
        nodes: Nodes,
        size: int,
        follow: Follow,
        arguments: Sequence[Any] = (),
        *,
        stages: int = 1,
        device: str = "cpu",
        timeout_s: float = 60.0,
        start_timeout_s: float = 300.0,
    ) -> None:
        """Take what `Ranks` takes; `run` does the work."""
        self.is_serving = False  # all ranks of the group are warm
        self._size = size
        self._stages = stages
        self._device = torch.device(device)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        own = size // nodes.count
        self._first = nodes.index * own
        ranks = range(self._first, self._first + own)
        self._processes = RankProcesses(ranks, follow, tuple(arguments))
        self._lost_rank = ""

    def run(self, line: Line) -> None:
        """Follow until the leader, reached by `line`, ends the group.

        Raises:
            RankLostError: the leader or one of our ranks was lost.
        """
        try:
            self._start_ranks(line)
            self._pass_on(line)
        except RankLostError as error:
            self._processes.kill()
            if self._lost_rank:
                raise RankLostError(self._lost_rank) from error
            raise
        finally:
            self.is_serving = False
            line.close()
        self._processes.stop()

    def _start_ranks(self, line: Line) -> None:
        host, port = json.loads(line.receive()[1])
        meeting = Meeting(
            size=self._size,
            stages=self._stages,
            first=self._first,
            store=(host, port),
            address=line.own_address,
            device=self._device,
            timeout_s=self._timeout_s,
            start_timeout_s=self._start_timeout_s,
        )
        self._processes.start(meeting, self._start_timeout_s)
        threading.Thread(target=self._watch, args=(line,), name="rank-watch", daemon=True).start()
        line.send(b"started")

    def _pass_on(self, line: Line) -> None:
        while True:
            kind, message = line.receive()
            if kind == MESSAGE:
                self._processes.send(message)
            elif kind == SERVING:
                line.expect_life()
                self.is_serving = True
            else:
                return

    def _watch(self, line: Line) -> None:
        self._lost_rank = self._processes.wait_for_end()
        line.close()
