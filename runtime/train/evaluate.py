"""The gate: is the candidate as good as its base on samples neither was trained on?

An evaluation can be long, so it is counted sample by sample and what is counted is kept: a job
that is asked to yield goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.durable import write_durably
from mizzen.runtime.train.measures import MEASURES
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.progress import Verdict
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.stop import StopFlag


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is known after the first `samples` of the holdout."""

    samples: int = 0
    weight: float = 0.0
    total: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of what was counted so far."""
        return self.total / max(1.0, self.weight)


class TallyStore:
    """The tallies of a job on disk, by who was asked: base or candidate."""

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        self._path = directory / "evaluation.json"
        self._fingerprint = fingerprint
        self._tallies = self._load()

    def get(self, who: str) -> Tally:
        """Return what was counted so far."""
        return self._tallies.get(who, Tally())

    def put(self, who: str, tally: Tally) -> None:
        """Keep a tally, across restarts."""
        self._tallies[who] = tally
        document = {
            "fingerprint": self._fingerprint,
            "tallies": {name: asdict(tally) for name, tally in self._tallies.items()},
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, json.dumps(document).encode())

    def _load(self) -> dict[str, Tally]:
        try:
            document = json.loads(self._path.read_bytes())
            if document["fingerprint"] != self._fingerprint:
                return {}
            return {name: Tally(**fields) for name, fields in document["tallies"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}  # counting again is always possible


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Asks a model about the holdout, a few samples at a time."""

    decoder: Decoder
    method: Method
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    holdout: Sequence[Item]
    micro_batch: int
    store: TallyStore
    stop: StopFlag

    def tally(self, who: str, lora: LoraDelta | None) -> Tally:
        """Return the tally over the whole holdout, continuing a stored one.

        Raises:
            YieldRequested: somebody asked to stop; what was counted is kept.
        """
        tally = self.store.get(who)
        try:
            while tally.samples < len(self.holdout):
                self.stop.check()
                tally = self._count(tally, lora)
        finally:
            self.store.put(who, tally)
        return tally

    @torch.no_grad()
    def _count(self, tally: Tally, lora: LoraDelta | None) -> Tally:
        items = self.holdout[tally.samples : tally.samples + self.micro_batch]
        with self.precision():
            total, weight = self.method.count(self.decoder, items, lora)
        return Tally(
            samples=tally.samples + len(items),
            weight=tally.weight + weight,
            total=tally.total + total,
        )


def decide_verdict(suite: Suite, *, base: Tally, candidate: Tally) -> Verdict:
    """Return whether the candidate stays within the suite's limit."""
    measure = MEASURES[suite.type]
    figures = {
        "base": measure.value(base.total, base.weight),
        "candidate": measure.value(candidate.total, candidate.weight),
    }
    ratio = measure.regression_ratio(**figures)
    return Verdict(
        suite=suite.name,
        **figures,
        regression_ratio=ratio,
        passed=ratio <= suite.max_regression_ratio,
    )
