"""The gate: is the candidate as good as its base on samples neither was trained on?

An evaluation can be long, so it is counted sample by sample and what is counted is kept: a job
that is asked to yield goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.data import Sample
from mizzen.runtime.train.durable import write_durably
from mizzen.runtime.train.loop import LossSum
from mizzen.runtime.train.progress import Verdict
from mizzen.runtime.train.stop import StopFlag

_EXP_LIMIT = 700.0  # beyond it a perplexity is no number any more


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is known after the first `samples` of the holdout."""

    samples: int = 0
    tokens: int = 0
    loss_sum: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Mean loss of the tokens counted so far."""
        return self.loss_sum / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        """The usual name of the exponential of that mean."""
        return math.exp(min(self.mean_loss, _EXP_LIMIT))


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
    loss_sum: LossSum
    holdout: Sequence[Sample]
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
        samples = self.holdout[tally.samples : tally.samples + self.micro_batch]
        batch = pack(samples, self.decoder.place.device)
        return Tally(
            samples=tally.samples + len(samples),
            tokens=tally.tokens + batch.labels,
            loss_sum=tally.loss_sum + self.loss_sum(self.decoder, batch, lora).item(),
        )


def decide_verdict(suite: Suite, *, base: Tally, candidate: Tally) -> Verdict:
    """Return whether the candidate's perplexity stays within the suite's limit."""
    ratio = candidate.perplexity / base.perplexity - 1.0
    return Verdict(
        suite=suite.name,
        base=base.perplexity,
        candidate=candidate.perplexity,
        regression_ratio=ratio,
        passed=ratio <= suite.max_regression_ratio,
    )
