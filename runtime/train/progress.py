"""How far the job is: written by the loop, read by the admin server's thread.

The document's fields are the operator's contract; what is not known yet is null, never zero.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mizzen.runtime.train.budget import Spent
from mizzen.runtime.train.checkpoint import Committed, Counters
from mizzen.runtime.train.curve import StepRecord

Phase = Literal["Preparing", "Running", "Evaluating", "Publishing", "Succeeded"]

TERMINATION_LOG_BYTES = 4096
_MEASURED_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One suite's answer; what base and candidate are depends on its measure."""

    suite: str
    base: float
    candidate: float
    regression_ratio: float
    samples: int
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What a job leaves behind, at a path of its own."""

    kind: Literal["adapter", "model"]
    path: str
    digest: str
    bytes: int
    copies: tuple[str, ...] = ()  # `<OCI layout>@<manifest's digest>`, `s3://...`


class ProgressBoard:
    """The current progress document; safe to read from any thread."""

    def __init__(self, *, generation: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._peak_tokens_per_second: float | None = None
        self._steps: deque[tuple[float, int]] = deque(maxlen=_MEASURED_STEPS + 1)
        self._document: dict[str, Any] = {
            "phase": "Preparing",
            "step": None,
            "totalSteps": None,
            "epoch": None,
            "loss": None,
            "evalLoss": None,
            "learningRate": None,
            "reward": None,
            "kl": None,
            "skippedSamples": None,
            "tokens": None,
            "tokensPerSecond": None,
            "mfuRatio": None,
            "etaSeconds": None,
            "budgetSpent": None,
            "checkpoint": None,
            "evaluation": [],
            "artifact": None,
            "dataset": None,
            "generation": generation,
        }

    def document(self) -> dict[str, Any]:
        """Return a copy of the document as it is now."""
        with self._lock:
            return {name: _known(value) for name, value in self._document.items()}

    def enter(self, phase: Phase) -> None:
        """Note that the job is in another phase."""
        with self._lock:
            self._document["phase"] = phase
            if phase != "Running":
                self._document["etaSeconds"] = 0 if phase == "Succeeded" else None

    def prepared(self, counts: Mapping[str, int]) -> None:
        """Note what became of the data: what is trained on, kept for the gate, cut, left out."""
        with self._lock:
            self._document["dataset"] = dict(counts)

    def plan(
        self,
        *,
        counters: Counters,
        total_steps: int,
        epoch: float,
        last: StepRecord | None,
    ) -> None:
        """Note where the job stands, what its last step measured, and where it ends."""
        with self._lock:
            self._steps.append((self._clock(), counters.tokens))
            self._document.update(
                step=counters.step,
                totalSteps=total_steps,
                tokens=counters.tokens,
                epoch=round(epoch, 4),
                loss=last.loss if last else None,
                learningRate=last.lr if last else None,
                skippedSamples=counters.skipped,
            )

    def peak(self, tokens_per_second: float | None) -> None:
        """Note how fast the devices could be at their very best, where that is known."""
        self._peak_tokens_per_second = tokens_per_second

    def ended_early(self, spent: Spent | None) -> None:
        """Note what part of the budget ended the training before its last step."""
        with self._lock:
            self._document["budgetSpent"] = spent

    def skipped(self, counters: Counters) -> None:
        """Note samples that were left out because their gradient was not finite."""
        with self._lock:
            self._document["skippedSamples"] = counters.skipped

    def advance(self, record: StepRecord, *, epoch: float) -> None:
        """Note a finished step, and what the last steps say about the rest."""
        with self._lock:
            self._steps.append((self._clock(), record.tokens))
            (began_at, tokens_before), (ended_at, _) = self._steps[0], self._steps[-1]
            elapsed_s = max(ended_at - began_at, 1e-9)
            step_s = elapsed_s / (len(self._steps) - 1)
            steps_left = self._document["totalSteps"] - record.step
            speed, peak = (record.tokens - tokens_before) / elapsed_s, self._peak_tokens_per_second
            self._document.update(
                step=record.step,
                tokens=record.tokens,
                epoch=round(epoch, 4),
                loss=record.loss,
                learningRate=record.lr,
                tokensPerSecond=round(speed, 1),
                mfuRatio=round(speed / peak, 4) if peak else None,
                etaSeconds=round(steps_left * step_s),
                **record.measured,
            )

    def evaluated(self, *, eval_loss: float | None, verdicts: list[Verdict]) -> None:
        """Note the gate's answers."""
        with self._lock:
            self._document["evalLoss"] = eval_loss
            self._document["evaluation"] = [
                {
                    "suite": verdict.suite,
                    "base": verdict.base,
                    "candidate": verdict.candidate,
                    "regressionRatio": verdict.regression_ratio,
                    "samples": verdict.samples,
                    "passed": verdict.passed,
                }
                for verdict in verdicts
            ]

    def committed(self, checkpoint: Committed) -> None:
        """Note the last checkpoint that is safe."""
        with self._lock:
            self._document["checkpoint"] = {
                "step": checkpoint.step,
                "committedAt": checkpoint.committed_at,
            }

    def published(self, artifact: Artifact) -> None:
        """Note what was published."""
        with self._lock:
            self._document["artifact"] = asdict(artifact)


def _known(value: object) -> object:
    """Return a value as the document holds it: what is no finite number would be no JSON."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fit_termination_log(document: dict[str, Any]) -> str:
    """Return the document as JSON that kubelet will not cut: suites go first, from the end."""
    slim = dict(document)
    while len(text := json.dumps(slim).encode()) > TERMINATION_LOG_BYTES and slim["evaluation"]:
        slim["evaluation"] = slim["evaluation"][:-1]
    return text.decode()
