"""What a trainer says about itself: the document of `GET /progress` and of its last words.

Numbers that a trainer has not measured yet are None, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

Document = dict[str, object]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published result; paths, copies' too, are those inside the trainer's pod."""

    kind: str
    path: str
    digest: str
    bytes: int
    copies: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """One suite's verdict; the ratio is of how much worse, whichever way its figures point."""

    suite: str
    base: float
    candidate: float
    regression_ratio: float
    is_passed: bool
    samples: int

    def to_api(self) -> Document:
        """Return the entry of `status.evaluation`."""
        return {
            "suite": self.suite,
            "base": round(self.base, 4),
            "candidate": round(self.candidate, 4),
            "regressionRatio": round(self.regression_ratio, 4),
            "samples": self.samples,
            "passed": self.is_passed,
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, as its rank 0 sees it."""

    phase: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Document | None = None
    scores: tuple[Score, ...] = ()
    artifact: Artifact | None = None
    budget_spent: str | None = None


_NUMBERS = (
    "step", "totalSteps", "epoch", "tokens", "tokensPerSecond", "mfuRatio", "etaSeconds",
    "loss", "evalLoss", "learningRate", "reward", "kl", "skippedSamples",
)  # fmt: skip


def parse_progress(document: Mapping[str, object]) -> Progress:
    """Return the progress a trainer reported; what it left out or misspelt is unknown.

    Raises:
        ValueError: the document is not a progress document at all.
    """
    phase = document.get("phase")
    if not isinstance(phase, str):
        raise ValueError("a progress document has a phase")
    numbers = {
        name: value
        for name in _NUMBERS
        if isinstance(value := document.get(name), int | float)
        and not isinstance(value, bool)
        and isfinite(value)
    }
    checkpoint = document.get("checkpoint")
    scores = document.get("evaluation")
    return Progress(
        phase=phase,
        numbers=numbers,
        checkpoint=dict(checkpoint) if isinstance(checkpoint, Mapping) else None,
        scores=tuple(map(_score, scores)) if isinstance(scores, list) else (),
        artifact=_artifact(document.get("artifact")),
        budget_spent=str(spent) if (spent := document.get("budgetSpent")) else None,
    )


def _score(entry: Mapping[str, object]) -> Score:
    return Score(
        suite=str(entry["suite"]),
        base=float(str(entry["base"])),
        candidate=float(str(entry["candidate"])),
        regression_ratio=float(str(entry["regressionRatio"])),
        is_passed=bool(entry["passed"]),
        samples=int(str(entry.get("samples", 0))),
    )


def _artifact(entry: object) -> Artifact | None:
    if not isinstance(entry, Mapping):
        return None
    return Artifact(
        kind=str(entry["kind"]),
        path=str(entry["path"]),
        digest=str(entry["digest"]),
        bytes=int(str(entry["bytes"])),
        copies=tuple(map(str, entry.get("copies") or ())),
    )
