"""What a FineTuneJob's status is made from, as values: step, pods, progress, promotion. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Fence,
    Finish,
    Generation,
    Step,
)
from mizzen.operator.status.progress import Artifact, Progress
from mizzen.operator.status.reasons import Reason

AT_WORK = frozenset({"Preparing", "Running", "Evaluating", "Publishing"})


@dataclass(frozen=True, slots=True)
class Problem:
    """What stands in the way; `is_final` where only a new job can cure it."""

    reason: Reason
    message: str
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class Approval:
    """Who let a result be served, and when the operator saw it."""

    by: str
    at: str


@dataclass(frozen=True, slots=True)
class Promotion:
    """How far the result is on the deployment it was trained for; `served_as` is its name there."""

    deployment: str
    served_as: str
    ready_replicas: int = 0
    replicas: int = 0
    problem: Problem | None = None
    approval: Approval | None = None
    replaced_by: str | None = None  # the job whose result came after it
    was_done: bool = False  # replicas that came later load it like everything they serve
    on_trial_since: str | None = None  # while its requests are watched

    @property
    def is_done(self) -> bool:
        """Whether every ready replica had the result at once, or has one that came after it."""
        is_served = self.was_done or 0 < self.replicas <= self.ready_replicas
        return (self.problem is None and is_served) or self.replaced_by is not None

    @property
    def has_failed(self) -> bool:
        """Whether it was tried and taken back."""
        return self.problem is not None and self.problem.is_final

    def to_api(self) -> dict[str, object]:
        """Return `status.promotion`."""
        who = {"approvedBy": self.approval.by, "approvedAt": self.approval.at} if (
            self.approval
        ) else {}  # fmt: skip
        counts = {"readyReplicas": self.ready_replicas, "replicas": self.replicas}
        trial = {"onTrialSince": self.on_trial_since} if self.on_trial_since else {}
        return {"servedAs": self.served_as, **counts, **who, **trial}


@dataclass(frozen=True, slots=True)
class Lending:
    """The devices that the newest generation got, and how the last ones went back."""

    nodes: tuple[str, ...] = ()
    preemptions: int = 0
    is_reclaimed: bool = False
    yield_s: float | None = None  # measured now; None where there is nothing new
    replica: str = ""  # whose weights it has, in mode Loan
    crashes: int = 0  # of the runs before the one there


@dataclass(frozen=True, slots=True)
class JobFacts:
    """Everything the status says, as values; `output_uri` is where the artifact's claim is."""

    step: Step | None
    newest: Generation | None
    is_suspended: bool
    problem: Problem | None
    progress: Progress | None
    artifact_uri: str | None
    copies: tuple[str, ...]  # of the artifact, as addresses
    has_suites: bool
    promotion: Promotion | None
    lending: Lending | None = None  # of a job that asks for devices, or waits in a queue

    @property
    def is_giving_back(self) -> bool:
        """Whether its pods are leaving since somebody needs what they hold."""
        is_leaving = isinstance(self.step, AskToYield | Fence | Dismiss)
        return is_leaving and self.lending is not None and self.lending.is_reclaimed


def is_evaluation_failed(progress: Progress | None) -> bool:
    """Whether a suite says that the candidate is worse than its base by more than it may be."""
    return progress is not None and any(not score.is_passed for score in progress.scores)


def is_blocked(progress: Progress | None) -> bool:
    """Whether a job that is done left nothing behind, because a suite forbade it."""
    return is_evaluation_failed(progress) and progress is not None and progress.artifact is None


def published_artifact(facts: JobFacts) -> Artifact | None:
    """Return the artifact once its job is done; a gate that blocks leaves none."""
    if not isinstance(facts.step, Finish) or facts.progress is None:
        return None
    return facts.progress.artifact
