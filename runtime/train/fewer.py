"""How many samples ranks of one model run at once, after memory ran out on one of them.

It cannot try again alone, as the others wait in the middle of a layer. So it notes beside the
checkpoints how many samples may fit and leaves; the others miss it, and the next generation begins
with as many. Each note is a smaller number than the one before, so there are few such ends.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.durable import storage_faults_of, write_durably
from mizzen.runtime.train.generate import AT_ONCE
from mizzen.runtime.train.halving import FewerAtOnce
from mizzen.runtime.train.workers import Workers

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most samples that run at once: what is read, and answers that are drawn."""

    micro_batch: int
    drawn: int = AT_ONCE

    def applied_to(self, config: TrainConfig) -> TrainConfig:
        """Return the same job with so many samples at once; its checkpoints stay its own."""
        update = {"micro_batch": self.micro_batch}
        hyper = config.hyperparameters.model_copy(update=update)
        return config.model_copy(update={"hyperparameters": hyper})


class FewerStore:
    """The notes of one job, in one folder: each worker has its own, as two may leave together.

    What so many ranks of a model have noted says nothing about another number of them.
    """

    def __init__(self, directory: Path, *, ranks: int) -> None:
        self._directory = directory
        self._ranks = ranks

    def least(self, wanted: Limits) -> Limits:
        """Return what is wanted, or as much of it as all notes allow."""
        for path in sorted(self._directory.glob("at-once-*.json")):
            try:
                note = json.loads(path.read_bytes())
                if note.pop("ranks") == self._ranks:
                    own = Limits(**note)
                    wanted = Limits(
                        micro_batch=min(wanted.micro_batch, own.micro_batch),
                        drawn=min(wanted.drawn, own.drawn),
                    )
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # damaged: where memory runs out again it is noted again
        return wanted

    def note(self, worker: int, now: Limits, fewer: FewerAtOnce) -> None:
        """Write down that a worker had no memory for as many as run now.

        Raises:
            StorageFullError, StorageNotWritableError: it cannot be kept.
        """
        log.warning("%s The next generation begins with as many.", fewer)
        left = replace(now, **{fewer.limit: fewer.samples})
        content = json.dumps({"ranks": self._ranks, **asdict(left)}).encode()
        with storage_faults_of("How many samples run at once", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            write_durably(self._directory / f"at-once-{worker}.json", content)


def agree_on(wanted: Limits, store: FewerStore, workers: Workers, device: torch.device) -> Limits:
    """Return what the leader finds noted, on all workers: they have to run as many at once.

    Raises:
        RankLostError: another worker is gone.
    """
    found = asdict(store.least(wanted)) if workers.is_leader else asdict(wanted)
    numbers = torch.tensor(list(found.values()), device=device)
    workers.copy_from_leader(numbers)
    return Limits(**dict(zip(found, numbers.tolist(), strict=True)))
