"""Whether an adapter that is served on trial is kept, watched on, or taken back. Pure.

It is held against all other requests of its deployment since the trial began: they run on the
same replicas, so what those do wrong is not held against the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from mizzen.operator.planning.canary import Answers, Limits, find_worse
from mizzen.operator.planning.course import GivenUp


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRules(Limits):
    """For how long an adapter is watched, and what takes it back."""

    hold_s: int


@dataclass(frozen=True, slots=True)
class Sides:
    """What the gateways counted since the trial began."""

    own: Answers = field(default_factory=Answers)
    others: Answers = field(default_factory=Answers)


class Verdict(Enum):
    """What becomes of the adapter."""

    WATCH = "watch"
    KEEP = "keep"
    TAKE_BACK = "take back"


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict, and why in words that stay the same while nothing changes."""

    verdict: Verdict
    why: str = ""


def decide_trial(
    since: datetime, sides: Sides | None, rules: TrialRules, *, now: datetime
) -> Decision:
    """Return what to do now; `sides` is None where the gateways tell nothing."""
    if sides is not None and (worse := find_worse(sides.own, sides.others, rules)) is not None:
        return Decision(Verdict.TAKE_BACK, _figures(worse, sides, rules))
    if now < since + timedelta(seconds=rules.hold_s):
        return Decision(Verdict.WATCH, f"Its requests are watched for {rules.hold_s} seconds.")
    if sides is None:
        return Decision(
            Verdict.WATCH,
            "The gateways do not tell how its requests fare, and without that nothing is promoted.",
        )
    return Decision(Verdict.KEEP)


def _figures(worse: GivenUp, sides: Sides, rules: TrialRules) -> str:
    own, others = sides.own, sides.others
    if worse is GivenUp.ERRORS:
        return (
            f"{own.failures:g} of its {own.requests:g} requests failed and {others.failures:g} of "
            f"the deployment's {others.requests:g} others; errorRatio allows "
            f"{rules.error_ratio:g} more."
        )
    return (
        f"Its TTFT p90 is {own.ttft_p90_s:.3g} s and that of the deployment's other requests "
        f"{others.ttft_p90_s:.3g} s; ttftFactor allows {rules.ttft_factor:g} times as much."
    )
