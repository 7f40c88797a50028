"""What the ranks that share one copy of a model agree on: when to stop, what is counted already.

All of them do the same things in the same order, or they would wait for each other for ever. What
only the first of them knows, it tells the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.evaluate import Tally, TallyStore
from mizzen.runtime.train.notes import NoteStore
from mizzen.runtime.train.stop import Stop, StopFlag, YieldRequested


class Together:
    """The group, and where its numbers have to be so that they can travel."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        self.group = group
        self._device = device

    @property
    def is_leader(self) -> bool:
        """Whether this rank tells the others."""
        return self.group.rank == 0

    def is_any(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank."""
        return bool(self.group.all_reduce(torch.tensor([float(flag)], device=self._device)).item())

    def tell(self, document: Any = None) -> Any:
        """Return the leader's document, which must be of JSON, on every rank."""
        return json.loads(self.say(json.dumps(document).encode() if self.is_leader else b""))

    def say(self, said: bytes = b"") -> bytes:
        """Return what the leader says on every rank."""
        size = torch.tensor([len(said)], device=self._device)
        count = int(self.group.broadcast(size).item())
        if not count:
            return b""
        content = np.frombuffer(bytearray(said), np.uint8) if self.is_leader else np.zeros(count)
        told = torch.from_numpy(content.astype(np.uint8)).to(self._device)
        return self.group.broadcast(told).cpu().numpy().tobytes()

    def from_leader(self, work: Callable[[Stop], bytes], stop: Stop) -> bytes:
        """Return on every rank what `work`, which is never nothing, gives the leader.

        It may take as long as it likes if it looks at its stop several times a second: each look
        is one that all ranks take together, so none of them waits long in a collective.

        Raises:
            YieldRequested: any rank was asked to stop; all of them raise it.
            RankLostError: another rank is gone, perhaps since the leader's work has failed.
        """
        if self.group.size == 1:
            return work(stop)
        if self.is_leader:
            return self.say(work(_Waiting(self, stop)))
        while not (told := self.say()):
            stop.check()
        return told

    def least(self, count: int) -> int:
        """Return the smallest of the ranks' counts."""
        own = torch.tensor([count], device=self._device)
        return int(self.group.all_gather(own).min().item())

    def ask_all(self, document: Any) -> list[Any]:
        """Return each rank's document, by rank; all must be of JSON."""
        return [json.loads(part) for part in self.gather(json.dumps(document).encode())]

    def gather(self, said: bytes) -> list[bytes]:
        """Return what each rank says, by rank."""
        own = torch.tensor([len(said)], device=self._device)
        sizes = self.group.all_gather(own).tolist()
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: len(said)] = torch.from_numpy(np.frombuffer(bytearray(said), np.uint8))
        joined = self.group.all_gather(padded.to(self._device)).cpu().split(len(padded))
        return [part[:size].numpy().tobytes() for part, size in zip(joined, sizes, strict=True)]


class _Waiting:
    """The leader's stop while others wait for it: they are told that they still do."""

    def __init__(self, ranks: Together, stop: Stop) -> None:
        self._ranks = ranks
        self._stop = stop

    @property
    def is_asked(self) -> bool:
        """Whether the job should stop; to look is also to show that one is alive."""
        self._ranks.say()
        return self._stop.is_asked

    def check(self) -> None:
        """Raise `YieldRequested` if any rank was asked to stop: all stand at a safe point."""
        if self.is_asked:
            raise YieldRequested


class SharedStop:
    """A wish that any rank was told of, seen by all of them at the same place."""

    def __init__(self, own: StopFlag, ranks: Together) -> None:
        self._own = own
        self._ranks = ranks

    @property
    def is_asked(self) -> bool:
        """Whether the job should stop; to look is also to show that one is alive."""
        return self._ranks.is_any(self._own.is_asked)

    def check(self) -> None:
        """Raise `YieldRequested` if any rank was asked to stop: all stand at a safe point."""
        if self.is_asked:
            raise YieldRequested


class SharedNotes:
    """The notes on the leader's disk: every rank goes on with the same item."""

    def __init__(self, own: NoteStore, ranks: Together) -> None:
        self._own = own
        self._ranks = ranks

    def load(self) -> list[Tensor]:
        """Return the answers that every rank can read."""
        answers = self._own.load()
        return answers[: self._ranks.least(len(answers))]

    def add(self, first: int, answers: Sequence[Tensor]) -> None:
        """Keep the answers of the items from `first` on, which all ranks have alike."""
        if self._ranks.is_leader:
            self._own.add(first, answers)


class SharedTallies:
    """The leader's tallies: every rank goes on with the same question."""

    def __init__(self, own: TallyStore, ranks: Together) -> None:
        self._own = own
        self._ranks = ranks

    def get(self, name: str) -> Tally:
        """Return what was counted so far."""
        return Tally.of(self._ranks.tell(asdict(self._own.get(name))))

    def put(self, name: str, tally: Tally) -> None:
        """Keep a tally, across restarts."""
        if self._ranks.is_leader:
            self._own.put(name, tally)
