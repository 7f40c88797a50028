"""Whether a canary goes one step on, waits, or is given up. Pure.

Judged from all answers since the canary began: the gateways count them apart by revision only
while there is one, so a restarted operator has the same figures. Unknown is not good: where the
gateways tell nothing, the canary waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from itertools import pairwise

from mizzen.operator.planning.course import Canary, GivenUp, Rollout, give_up


@dataclass(frozen=True, slots=True)
class CanaryStep:
    """A share of the requests, in percent, and for how long."""

    weight: int
    hold_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """By how much worse something new may fare than what is proven; None is not looked at."""

    error_ratio: float | None = None  # of its answers, above the others' ratio
    ttft_factor: float | None = None  # of the others' p90
    min_requests: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryRules(Limits):
    """The steps, and what ends the canary early."""

    steps: Sequence[CanaryStep]
    has_probe: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """What the gateways counted of one kind of requests."""

    requests: float = 0.0
    failures: float = 0.0
    first_bytes: Mapping[float, float] = field(default_factory=dict)  # cumulative, by upper edge

    @property
    def error_ratio(self) -> float:
        """Share of its requests that failed by its own fault."""
        return self.failures / self.requests if self.requests else 0.0

    @property
    def ttft_p90_s(self) -> float | None:
        """Time within which nine of ten answers began, None without answers."""
        return quantile(self.first_bytes, 0.9)


class Probe(Enum):
    """What the probe prompt came to."""

    PASSED = "passed"
    NO_ANSWER = "no answer"
    UNEXPECTED = "unexpected"


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryLook:
    """What is seen of the canary now."""

    serving: int
    wanted: int  # replicas that the step's weight takes
    canary: Answers | None = None  # None: not known
    stable: Answers | None = None
    probe: Probe | None = None  # None: not asked
    said: str = ""  # the unexpected answer's beginning


class Verdict(Enum):
    """What becomes of the canary."""

    WAIT = "wait"
    START = "start"  # the step's weight takes effect
    ADVANCE = "advance"
    PROMOTE = "promote"
    GIVE_UP = "give up"


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict, and why in words that stay the same while nothing changes."""

    verdict: Verdict
    why: str
    reason: GivenUp | None = None


def decide_canary(
    canary: Canary, look: CanaryLook, rules: CanaryRules, *, now: datetime
) -> Decision:
    """Return what to do now."""
    if canary.step >= len(rules.steps):
        return Decision(Verdict.PROMOTE, "No step is left.")
    if (trouble := _trouble(look, rules)) is not None:
        return trouble
    step = rules.steps[canary.step]
    number = f"step {canary.step + 1} of {len(rules.steps)}"
    holds = f"Canary {number} at {step.weight} %."
    if canary.since is None:
        return _hindrance(look, rules, number) or Decision(Verdict.START, holds)
    if now < canary.since + timedelta(seconds=step.hold_s):
        return Decision(Verdict.WAIT, holds)
    if _needs_figures(rules) and (look.canary is None or look.stable is None):
        return Decision(
            Verdict.WAIT,
            f"Canary {number} waits: the gateways do not tell how requests fare, and without "
            "that nothing is promoted.",
        )
    if canary.step + 1 == len(rules.steps):
        return Decision(Verdict.PROMOTE, _figures(look))
    return Decision(Verdict.ADVANCE, _figures(look))


def apply_decision(
    rollout: Rollout, decision: Decision, rules: CanaryRules, *, now: datetime
) -> Rollout:
    """Return the rollout after a decision on its canary. A pause only lets it be given up."""
    canary = rollout.canary
    if canary is None or decision.verdict is Verdict.WAIT:
        return rollout
    if decision.reason is not None:
        return give_up(rollout, decision.reason, decision.why, now=now)
    if rollout.is_paused:
        return rollout
    after: Canary | None = None
    if decision.verdict is Verdict.START:
        after = replace(canary, weight=rules.steps[canary.step].weight, since=now)
    elif decision.verdict is Verdict.ADVANCE:
        after = Canary(canary.step + 1, canary.weight, passed=decision.why)
    return replace(rollout, canary=after, moved_at=now)


def find_worse(own: Answers, others: Answers, limits: Limits) -> GivenUp | None:
    """Return in what `own` fares worse than it may, None where it does not or too few tell."""
    if own.requests < limits.min_requests:
        return None
    if limits.error_ratio is not None and own.error_ratio > limits.error_ratio + others.error_ratio:
        return GivenUp.ERRORS
    slow, usual = own.ttft_p90_s, others.ttft_p90_s
    if limits.ttft_factor is None or slow is None or usual is None:
        return None
    if others.requests < limits.min_requests or slow <= limits.ttft_factor * usual:
        return None
    return GivenUp.SLOW


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Return the quantile of a cumulative histogram, interpolated as Prometheus does.

    In the open last bucket it is that bucket's lower edge. None without observations.
    """
    edges = sorted(buckets.items())
    if not edges or edges[-1][1] <= 0:
        return None
    rank = share * edges[-1][1]
    for (low, below), (high, within) in pairwise([(0.0, 0.0), *edges]):
        if within >= rank:
            if high == float("inf"):
                return low
            return low + (high - low) * (rank - below) / (within - below)
    return edges[-1][0]


def _hindrance(look: CanaryLook, rules: CanaryRules, number: str) -> Decision | None:
    """Return what a step waits for before it begins."""
    if look.serving < look.wanted:
        how_many = f"{look.serving} of {look.wanted} canary replicas in service"
        return Decision(Verdict.WAIT, f"Canary {number}: {how_many}.")
    if rules.has_probe and look.probe is not Probe.PASSED:
        return Decision(Verdict.WAIT, f"Canary {number}: the probe prompt is not answered yet.")
    return None


def _trouble(look: CanaryLook, rules: CanaryRules) -> Decision | None:
    if look.probe is Probe.UNEXPECTED:
        return _give_up(
            GivenUp.PROBE,
            f"The answer to the probe prompt does not match what is expected: {look.said!r}.",
        )
    canary, stable = look.canary, look.stable
    if canary is None or stable is None:
        return None
    worse = find_worse(canary, stable, rules)
    if worse is GivenUp.ERRORS:
        return _give_up(
            worse,
            f"{canary.failures:g} of {canary.requests:g} requests failed at the canary and "
            f"{stable.failures:g} of {stable.requests:g} at the revision before; "
            f"errorRatio allows {rules.error_ratio:g} more.",
        )
    if worse is GivenUp.SLOW:
        return _give_up(
            worse,
            f"The canary's TTFT p90 is {canary.ttft_p90_s:.3g} s and that of the revision before "
            f"{stable.ttft_p90_s:.3g} s; ttftFactor allows {rules.ttft_factor:g} times as much.",
        )
    return None


def _give_up(reason: GivenUp, why: str) -> Decision:
    return Decision(Verdict.GIVE_UP, why, reason)


def _needs_figures(rules: CanaryRules) -> bool:
    return rules.error_ratio is not None or rules.ttft_factor is not None


def _figures(look: CanaryLook) -> str:
    """Return the figures that a step was passed with."""
    if look.canary is None or look.stable is None:
        return ""
    parts = [f"{look.canary.failures:g} of {look.canary.requests:g} requests failed"]
    slow, usual = look.canary.ttft_p90_s, look.stable.ttft_p90_s
    if slow is not None and usual is not None:
        parts.append(f"TTFT p90 {slow:.3g} s against {usual:.3g} s")
    return ", ".join(parts)
