"""What a replica says about the job it lends its weights to, told as the pod of a trainer.

What is decided of a trainer's pod, and said about it, then holds for a loan too. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.desired.labels import GENERATION, RANK, RESTARTS
from mizzen.operator.status.progress import Progress, parse_progress

Document = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Loan:
    """A generation of a job at a replica; `exit_code` is None while it is at it."""

    job: str
    generation: int
    directory: str  # of its checkpoints, by which jobs of one name differ
    progress: Document
    exit_code: int | None = None
    ended_at: str = ""
    reason: str = ""
    message: str = ""

    @property
    def last_words(self) -> str:
        """What a trainer that ended so would have left in its pod."""
        if self.message:
            return json.dumps({"reason": self.reason or "TrainerCrashed", "message": self.message})
        return json.dumps(self.progress)


@dataclass(frozen=True, slots=True)
class Lender:
    """A replica as it answered: the job it has or had, and the requests that are there."""

    loan: Loan | None
    in_flight: int

    @property
    def is_free(self) -> bool:
        """Whether no job has its weights."""
        return self.loan is None or self.loan.exit_code is not None


def parse_lender(document: Document) -> Lender:
    """Return what a replica answered.

    Raises:
        ValueError: that is no answer about loans.
    """
    in_flight, loan = document.get("inFlight"), document.get("loan")
    if not isinstance(in_flight, int):
        raise ValueError("an answer about loans has inFlight")
    if not isinstance(loan, Mapping):
        return Lender(None, in_flight)
    code, progress = loan["exitCode"], dict(loan["progress"])
    parse_progress(progress)
    return Lender(
        Loan(
            job=str(loan["job"]),
            generation=int(loan["generation"]),
            directory=str(loan["directory"]),
            progress=progress,
            exit_code=None if code is None else int(code),
            ended_at=str(loan["endedAt"]),
            reason=str(loan["reason"]),
            message=str(loan["message"]),
        ),
        in_flight,
    )


def progress_of(loan: Loan | None) -> Progress | None:
    """Return how far a loan is, None where its replica does not answer."""
    return None if loan is None else parse_progress(loan.progress)


def build_trainer(replica: Json, loan: Loan | None, *, generation: int, crashes: int) -> Json:
    """Return the pod that a trainer would be; without a loan, of one that is silent."""
    return {
        "metadata": {
            "name": replica["metadata"]["name"],
            "labels": {GENERATION: str(generation), RANK: "0"},
            "annotations": {RESTARTS: str(crashes)},
        },
        "spec": {"nodeName": (replica.get("spec") or {}).get("nodeName")},
        "status": {"podIP": replica["status"].get("podIP"), **_status(loan)},
    }


def _status(loan: Loan | None) -> Json:
    if loan is None or loan.exit_code is None:
        return {"phase": "Running"}
    terminated = {
        "exitCode": loan.exit_code,
        "finishedAt": loan.ended_at,
        "message": loan.last_words,
    }
    return {
        "phase": "Succeeded" if loan.exit_code == 0 else "Failed",
        "containerStatuses": [{"state": {"terminated": terminated}}],
    }
