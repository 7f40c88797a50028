"""What a job does next, from what its newest generation of pods did.

A job runs in numbered generations: a resize, a yield, a crash and a lost node are all "this
generation ended, start the next from the last committed checkpoint". The numbers live on the pods
themselves, so a restarted operator comes to the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from mizzen.operator.planning.lending import Wait

YIELDED_EXIT_CODE = 75
BAD_CONFIGURATION_EXIT_CODE = 42
WORKER_LOST_EXIT_CODE = 76
_FIRST_WAIT_S = 10
_LONGEST_WAIT_S = 300
# A scheduler needs seconds for pods it has room for; an autoscaler of nodes may need longer, but
# meanwhile the placed ones hold devices for nothing.
_PLACING_S = 60
# A larger generation reads the model again; devices that are lent for minutes are not worth that.
RESIZE_EVERY = timedelta(minutes=5)


class Outcome(Enum):
    """Where one pod, or the pods of one generation, stand."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    YIELDED = "yielded"
    REJECTED = "rejected"  # bad configuration: running it again cannot help
    CRASHED = "crashed"
    LOST = "lost"  # evicted, deleted, or its node is gone: nobody's fault
    LEFT = "left"  # one pod alone: it went because another one was gone
    ENDING = "ending"  # the generation alone: some pods have ended, others not yet


@dataclass(frozen=True, slots=True)
class Generation:
    """The newest generation; `crashes` counts those of the generations before it."""

    number: int
    outcome: Outcome
    crashes: int = 0
    ended_at: datetime | None = None
    workers: int = 1
    placed: int = 1  # of them, those that have a node
    created_at: datetime | None = None
    tensor: int = 1  # workers that share one copy of the model


@dataclass(frozen=True, slots=True)
class Range:
    """How many workers a job may have, always in groups of `tensor` that share a copy."""

    min: int = 1
    max: int = 1
    tensor: int = 1


@dataclass(frozen=True, slots=True)
class Start:
    """Make the pods of this generation."""

    number: int
    crashes: int
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Shrink(Start):
    """The same, in place of a generation for which there is not enough room."""


@dataclass(frozen=True, slots=True)
class Lend(Start):
    """The same, on the weights of this replica, which has begun."""

    replica: str = ""


@dataclass(frozen=True, slots=True)
class Dismiss:
    """Have the pods that are left follow those that have ended."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Pods are there; ask them how far they are."""


@dataclass(frozen=True, slots=True)
class AskToYield:
    """Have the pods commit a checkpoint and leave."""


@dataclass(frozen=True, slots=True)
class Queue:
    """The next generation waits for devices, or the pods of this one to be admitted."""

    wait: Wait


@dataclass(frozen=True, slots=True)
class Fence:
    """It did not leave in the time it promised: its pods are ended where they are."""


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Crashed; start again at this time and not before."""

    at: datetime
    crashes: int


@dataclass(frozen=True, slots=True)
class Rest:
    """Suspended, with no pods left."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The trainer ended by itself, its result is in the last progress document."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Another generation would end the same way."""

    crashes: int


Step = (
    Start
    | Shrink
    | Lend
    | Dismiss
    | Watch
    | Queue
    | AskToYield
    | Fence
    | WaitUntil
    | Rest
    | Finish
    | GiveUp
)


def backoff_s(crashes: int) -> int:
    """Return how long to wait after the given number of crashes: 10 s doubled up to 5 minutes."""
    doublings = max(0, min(crashes, 16) - 1)
    return min(_LONGEST_WAIT_S, _FIRST_WAIT_S << doublings)


def outcome_of_group(outcomes: Sequence[Outcome]) -> Outcome:
    """Return where a generation stands, from its pods' outcomes by rank; the leader's is first.

    A pod that was lost takes the others with it, and one that was asked to stop had the others
    stop: what one of them says of itself explains why all are gone.
    """
    if outcomes[0] is Outcome.DONE:
        return Outcome.DONE
    failed = set(outcomes) - {Outcome.PENDING, Outcome.RUNNING, Outcome.DONE}
    if not failed:
        return Outcome.PENDING if Outcome.PENDING in outcomes else Outcome.RUNNING
    if {Outcome.PENDING, Outcome.RUNNING} & set(outcomes):
        return Outcome.ENDING
    telling = (Outcome.REJECTED, Outcome.YIELDED, Outcome.CRASHED, Outcome.LOST)
    # Where all have left because of each other they never met: that may be for ever, so it counts.
    return next((outcome for outcome in telling if outcome in failed), Outcome.CRASHED)


def decide_generation(
    newest: Generation | None,
    *,
    is_suspended: bool,
    backoff_limit: int,
    now: datetime,
    workers: Range = Range(),
) -> Step:
    """Return the one thing to do for a job that has not ended.

    `newest` is None before the first generation. Yields and lost pods never count against the
    back-off limit: the job did nothing wrong.
    """
    if newest is None:
        return Rest() if is_suspended else Start(number=1, crashes=0, workers=workers.max)
    match newest.outcome:
        case Outcome.DONE:
            return Finish()
        case Outcome.REJECTED:
            return GiveUp(crashes=newest.crashes)
        case Outcome.PENDING | Outcome.RUNNING:
            return AskToYield() if is_suspended else _while_running(newest, workers, now)
        case Outcome.ENDING:
            return Dismiss()
        case Outcome.CRASHED:
            return _after_crash(newest, is_suspended, backoff_limit, now, workers)
        case _:
            if is_suspended:
                return Rest()
            return Start(newest.number + 1, newest.crashes, workers.max)


def may_grow(newest: Generation | None, workers: Range, *, now: datetime) -> bool:
    """Whether a generation has for a while run with fewer workers than the job can use."""
    if newest is None or newest.outcome is not Outcome.RUNNING or newest.created_at is None:
        return False
    return newest.workers < workers.max and now - newest.created_at >= RESIZE_EVERY


def _while_running(newest: Generation, workers: Range, now: datetime) -> Step:
    is_within = workers.min <= newest.workers <= workers.max
    if not is_within or newest.tensor != workers.tensor:
        return AskToYield()  # the job was changed meanwhile
    waited_s = (now - (newest.created_at or now)).total_seconds()
    is_short = newest.outcome is Outcome.PENDING and newest.placed < newest.workers
    fitting = newest.placed - newest.placed % workers.tensor
    if is_short and fitting >= workers.min and waited_s > _PLACING_S:
        return Shrink(newest.number + 1, newest.crashes, fitting)
    return Watch()


def _after_crash(
    newest: Generation, is_suspended: bool, backoff_limit: int, now: datetime, workers: Range
) -> Step:
    crashes = newest.crashes + 1
    if crashes > backoff_limit:
        return GiveUp(crashes=crashes)
    if is_suspended:
        return Rest()
    ready_at = (newest.ended_at or now) + timedelta(seconds=backoff_s(crashes))
    if now < ready_at:
        return WaitUntil(at=ready_at, crashes=crashes)
    return Start(newest.number + 1, crashes, workers.max)


def with_lending(
    step: Step,
    *,
    wait: Wait | None,
    reclaimed_at: datetime | None,
    yield_within_s: int | None,
    now: datetime,
) -> Step:
    """Return the step as the devices allow it.

    `wait` says why a job may not start yet; `reclaimed_at` since when somebody needs what its pods
    hold; `yield_within_s` is None where it is not ours to end them if they stay.
    """
    match step:
        case Start() if wait is not None:
            return Queue(wait)
        case Watch() | AskToYield() | Dismiss() if reclaimed_at is not None:
            stayed_s = (now - reclaimed_at).total_seconds()
            if yield_within_s is not None and stayed_s >= yield_within_s:
                return Fence()
            return step if isinstance(step, Dismiss) else AskToYield()
    return step
