"""The gate: is the candidate as good as its base on samples neither was trained on?

An evaluation can be long, so it is counted question by question and what is counted is kept: a
job that is asked to yield goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.durable import write_durably
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.measures import Measure
from mizzen.runtime.train.progress import Verdict
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.suites.exam import Count, Exam, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What is known after the first `samples` questions of a suite."""

    samples: int = 0
    weight: float = 0.0
    total: float = 0.0
    answers: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Tally:
        """Return the tally that `asdict` and JSON made these fields of."""
        return cls(**{**fields, "answers": tuple(fields["answers"])})

    @property
    def mean(self) -> float:
        """Mean of what was counted so far."""
        return self.total / max(1.0, self.weight)


class Tallies(Protocol):
    """What is counted so far, across restarts."""

    def get(self, name: str) -> Tally:
        """Return what was counted so far."""
        ...

    def put(self, name: str, tally: Tally) -> None:
        """Keep a tally."""
        ...


class TallyStore:
    """The tallies of a job on disk, by who was asked what: `base/holdout`, `candidate-8/holdout`.

    Several steps may become the candidate one after the other, where the best one is damaged.
    """

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        self._path = directory / "evaluation.json"
        self._fingerprint = fingerprint
        self._tallies = self._load()

    def get(self, name: str) -> Tally:
        """Return what was counted so far."""
        return self._tallies.get(name, Tally())

    def put(self, name: str, tally: Tally) -> None:
        """Keep a tally, across restarts."""
        self._tallies[name] = tally
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
            return {name: Tally.of(fields) for name, fields in document["tallies"].items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {}  # counting again is always possible


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """Puts every suite's questions to the base, and later to the candidate."""

    exams: Sequence[Exam]
    micro_batch: int
    store: Tallies
    stop: Stop
    ranks: int = 1  # of the model that is asked

    def ask_base(self, subject: Subject) -> None:
        """Count what the candidate will be compared with.

        Raises:
            YieldRequested: somebody asked to stop; what was counted is kept.
        """
        for exam in self.exams:
            self.tally(f"base/{exam.suite.name}", exam, subject, base=None)

    def ask_candidate(self, subject: Subject, *, step: int) -> list[Verdict]:
        """Return each suite's verdict on the weights after `step`.

        Raises:
            YieldRequested: somebody asked to stop; what was counted is kept.
        """
        verdicts: list[Verdict] = []
        for exam in self.exams:
            base = self.store.get(f"base/{exam.suite.name}")
            candidate = self.tally(_candidate(step, exam), exam, subject, base=base)
            verdicts.append(
                decide_verdict(exam.suite, exam.measure, base=base, candidate=candidate)
            )
        return verdicts

    def loss(self, *, step: int) -> float | None:
        """Return that candidate's mean loss on the holdout, where a suite has measured one."""
        losses = (e for e in self.exams if not e.measure.is_higher_better)
        exam = next(losses, None)
        return None if exam is None else self.store.get(_candidate(step, exam)).mean

    @torch.no_grad()
    def tally(self, name: str, exam: Exam, subject: Subject, *, base: Tally | None) -> Tally:
        """Return an exam's tally, counted to its end under `name`.

        Raises:
            YieldRequested: somebody asked to stop; what was counted is kept.
            MemoryTooSmallError: not even one question fits.
            FewerAtOnce: not as many fit as ranks of one model are asked at once.
        """
        tally = self.store.get(name)
        at_once = AtOnce(self.micro_batch)

        def count_next() -> tuple[slice, Count]:
            span = slice(tally.samples, min(tally.samples + at_once.samples, len(exam)))
            return span, exam.count(subject, span, base.answers if base else None)

        try:
            while tally.samples < len(exam):
                self.stop.check()
                span, count = at_once.fit(
                    count_next, of=len(exam) - tally.samples, ranks=self.ranks
                )
                tally = Tally(
                    samples=span.stop,
                    weight=tally.weight + count.weight,
                    total=tally.total + count.total,
                    answers=tally.answers + count.answers,
                )
        finally:
            self.store.put(name, tally)
        return tally


def _candidate(step: int, exam: Exam) -> str:
    return f"candidate-{step}/{exam.suite.name}"


def decide_verdict(suite: Suite, measure: Measure, *, base: Tally, candidate: Tally) -> Verdict:
    """Return whether the candidate stays within the suite's limit."""
    figures = {
        "base": measure.value(base.total, base.weight),
        "candidate": measure.value(candidate.total, candidate.weight),
    }
    ratio = measure.regression_ratio(**figures)
    return Verdict(
        suite=suite.name,
        **figures,
        regression_ratio=ratio,
        samples=candidate.samples,
        # Also beside a base that has none itself.
        passed=math.isfinite(candidate.total) and ratio <= suite.max_regression_ratio,
    )
