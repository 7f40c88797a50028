"""How far a deployment's rollout has come, and whether it goes on or back. Pure.

All there is to remember is a `Rollout`, kept in the deployment's status while one is under way or
has failed; a restarted operator goes on from there. A deployment at rest has none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum


class GivenUp(StrEnum):
    """Why a revision is not brought in after all."""

    LATE = "ProgressDeadlineExceeded"
    ERRORS = "CanaryErrors"
    SLOW = "CanarySlow"
    PROBE = "CanaryProbeFailed"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a revision was given up."""

    reason: GivenUp
    message: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Canary:
    """How far the new revision's share of the requests has grown."""

    step: int = 0
    weight: int = 0  # percent that it gets now
    since: datetime | None = None  # when the step's weight took effect; None: not yet
    passed: str = ""  # the figures that the last step was passed with


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A new revision on its way in, or given up."""

    revision: str
    stable: str  # where to go back to; empty where that cannot be made again
    moved_at: datetime  # when it began or last came further
    serving: int = 0  # the most of its replicas that have served at once
    is_paused: bool = False
    in_place_refused: str = ""  # why replicas are replaced instead of given new weights
    canary: Canary | None = None  # None: there is none, or it has passed
    failure: Failure | None = None

    @property
    def target(self) -> str:
        """The revision that all replicas should come to."""
        return self.stable if self.failure else self.revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What is seen of the new revision."""

    serving: int  # its replicas in service
    is_complete: bool  # those are as many as wanted
    is_alone: bool = True  # no replica of another revision is there
    trouble: str = ""  # what keeps them from serving
    is_draining: bool = False  # a replica of another revision finishes its requests
    has_drained: bool = False  # or has done so and gone since the last look


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the user said of rollouts."""

    is_paused: bool = False
    rests: bool = False  # no replica is wanted
    deadline_s: int = 3600


def begin(
    previous: Rollout | None,
    *,
    wanted: str,
    before: str,
    known: Collection[str],
    has_canary: bool = False,
    now: datetime,
) -> Rollout | None:
    """Return the rollout that the spec asks for: the one under way, another, or none.

    `before` is the revision that status named last; `known` are those that can be made again.
    """
    if previous is not None and previous.revision == wanted:
        return previous
    if previous is None and before in ("", wanted):
        return None
    stable = before if previous is None else previous.stable
    if wanted == stable:
        return None  # back to where the last rollout came from
    if stable not in known:
        return Rollout(revision=wanted, stable="", moved_at=now)
    canary = Canary() if has_canary else None
    return Rollout(revision=wanted, stable=stable, moved_at=now, canary=canary)


def proceed(rollout: Rollout, look: Look, rules: Rules, *, now: datetime) -> Rollout | None:
    """Return the rollout after a look at its replicas, None once it is over.

    Where no replica is wanted nothing is proven: it goes on when one is.
    """
    if rollout.failure is not None:
        return rollout
    # A canary's replicas may be as many as wanted beside those that it is compared with.
    is_over = look.is_complete and (look.is_alone or rollout.canary is None)
    if is_over and not rules.rests:
        return None
    waits = rules.is_paused or rules.rests
    if rollout.is_paused != waits:
        # Time that it was not allowed to use does not count.
        rollout = replace(rollout, is_paused=waits, moved_at=now)
    if rules.rests:
        canary = rollout.canary and replace(rollout.canary, since=None)
        return replace(rollout, serving=0, canary=canary)
    if look.serving > rollout.serving or look.has_drained:
        serving = max(look.serving, rollout.serving)
        rollout = replace(rollout, serving=serving, moved_at=now)
    left = left_s(rollout, look, rules, now=now)
    if left is not None and left <= 0:
        return give_up(rollout, GivenUp.LATE, _lateness(rules, look), now=now)
    return rollout


def left_s(rollout: Rollout, look: Look, rules: Rules, *, now: datetime) -> float | None:
    """Return how long it may go on standing still, None where it may for ever."""
    if look.is_draining:
        return None  # the next replica comes when that one has gone, which has a limit of its own
    if rollout.is_paused or rollout.failure is not None or not rollout.stable:
        return None
    if rollout.canary is not None and rollout.canary.since is not None:
        return None  # it stands still on purpose
    return (rollout.moved_at + timedelta(seconds=rules.deadline_s) - now).total_seconds()


def give_up(rollout: Rollout, reason: GivenUp, message: str, *, now: datetime) -> Rollout:
    """Return the rollout on its way back; it is not tried again until the spec changes."""
    return replace(rollout, canary=None, failure=Failure(reason, message, now))


def _lateness(rules: Rules, look: Look) -> str:
    trouble = f" {look.trouble}" if look.trouble else ""
    return (
        f"No further replica came into service within {rules.deadline_s} seconds "
        f"(spec.rollout.progressDeadlineSeconds).{trouble}"
    )
