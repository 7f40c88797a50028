"""What the ranks that share one copy of a model agree on: when to stop, what is counted already.

All of them do the same things in the same order, or they would wait for each other for ever. What
only the first of them knows, it tells the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.evaluate import Tally, TallyStore
from mizzen.runtime.train.notes import NoteStore
from mizzen.runtime.train.stop import Stop, StopFlag, YieldRequested

T = TypeVar("T")


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
        """Return on every rank what `work` gives the leader, while all wait as `wait_together`."""
        return self.say(wait_together([self], work if self.is_leader else None, stop) or b"")

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Return the sums of the ranks' numbers."""
        own = torch.tensor(numbers, dtype=torch.float32, device=self._device)
        return list(self.group.all_reduce(own).tolist())

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


def wait_together(
    groups: Sequence[Together], work: Callable[[Stop], T] | None, stop: Stop
) -> T | None:
    """Return what `work` gives, on those that have some, once all workers of the groups are done.

    It may take as long as it likes if it looks at its stop several times a second: each look is
    one that all of them take together, so that none waits long in a collective.

    Raises:
        YieldRequested: any of them was asked to stop; all of them raise it.
        RankLostError: another worker is gone, perhaps since its work has failed.
    """
    looks = _Looks(groups, stop)
    found = None if work is None else work(looks)
    while looks.is_any_at_work():
        continue  # at the pace of those that are
    return found


class _Looks:
    """The stop of workers that wait for each other, of which some are at work."""

    def __init__(self, groups: Sequence[Together], stop: Stop) -> None:
        self._groups = groups
        self._stop = stop

    @property
    def is_asked(self) -> bool:
        """Whether the job should stop; to look is also to show that one is alive."""
        return self._look(is_at_work=True)[1] > 0

    def check(self) -> None:
        """Raise `YieldRequested` if any was asked to stop: all stand at a safe point."""
        if self.is_asked:
            raise YieldRequested

    def is_any_at_work(self) -> bool:
        """Look as one that is not; raises as `check` does."""
        at_work, asked = self._look(is_at_work=False)
        if asked:
            raise YieldRequested
        return at_work > 0

    def _look(self, *, is_at_work: bool) -> Sequence[float]:
        numbers: Sequence[float] = [float(is_at_work), float(self._stop.is_asked)]
        for ranks in self._groups:
            numbers = ranks.sum(numbers)
        return numbers


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
