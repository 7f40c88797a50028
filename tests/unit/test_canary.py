"""When a canary goes on, waits, or is given up: the judgement as a table of sentences."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mizzen.operator.planning.canary import (
    Answers,
    CanaryLook,
    CanaryRules,
    CanaryStep,
    Decision,
    Probe,
    Verdict,
    apply_decision,
    decide_canary,
    quantile,
)
from mizzen.operator.planning.course import Canary, Failure, GivenUp, Rollout

NOW = datetime(2026, 9, 1, 12, 0, 0, tzinfo=UTC)
V = Verdict
STEPS = (CanaryStep(10, 60), CanaryStep(50, 60))
RULES = CanaryRules(steps=STEPS, error_ratio=0.05, ttft_factor=1.5, min_requests=10, has_probe=True)
INF = float("inf")


def answers(requests: float = 100, failures: float = 0, *, p90_s: float = 0.1) -> Answers:
    edges = {p90_s: 0.9 * requests, 2 * p90_s: requests, INF: requests}
    return Answers(requests, failures, edges)


GOOD = CanaryLook(serving=1, wanted=1, canary=answers(), stable=answers(900))
STARTING = Canary(0, 0, None)
HOLDING = Canary(0, 10, NOW - timedelta(seconds=59))
HELD = Canary(0, 10, NOW - timedelta(seconds=60))
LAST = Canary(1, 50, NOW - timedelta(seconds=60))

CASES: dict[str, tuple[Canary, CanaryLook, CanaryRules, Verdict, str]] = {
    "waits for its replicas": (
        STARTING, replace(GOOD, serving=1, wanted=2), RULES, V.WAIT,
        "Canary step 1 of 2: 1 of 2 canary replicas in service.",
    ),
    "waits for the probe's answer": (
        STARTING, replace(GOOD, probe=Probe.NO_ANSWER), RULES, V.WAIT,
        "Canary step 1 of 2: the probe prompt is not answered yet.",
    ),
    "begins when the probe is answered": (
        STARTING, replace(GOOD, probe=Probe.PASSED), RULES, V.START, "Canary step 1 of 2 at 10 %.",
    ),
    "begins without a probe where none is wanted": (
        STARTING, GOOD, replace(RULES, has_probe=False), V.START, "Canary step 1 of 2 at 10 %.",
    ),
    "is given up by an answer that does not fit": (
        STARTING, replace(GOOD, probe=Probe.UNEXPECTED, said="6"), RULES, V.GIVE_UP,
        "The answer to the probe prompt does not match what is expected: '6'.",
    ),
    "holds its share": (HOLDING, GOOD, RULES, V.WAIT, "Canary step 1 of 2 at 10 %."),
    "goes on after its hold, and says how it went": (
        HELD, GOOD, RULES, V.ADVANCE, "0 of 100 requests failed, TTFT p90 0.1 s against 0.1 s",
    ),
    "is promoted after the last hold": (
        LAST, GOOD, RULES, V.PROMOTE, "0 of 100 requests failed, TTFT p90 0.1 s against 0.1 s",
    ),
    "is promoted where no step is left": (
        HOLDING, GOOD, replace(RULES, steps=()), V.PROMOTE, "No step is left.",
    ),
    "is given up in the middle of a hold when requests fail": (
        HOLDING, replace(GOOD, canary=answers(100, 6)), RULES, V.GIVE_UP,
        "6 of 100 requests failed at the canary and 0 of 900 at the revision before; errorRatio "
        "allows 0.05 more.",
    ),
    "is not blamed for what fails everywhere": (
        HELD, replace(GOOD, canary=answers(100, 6), stable=answers(900, 54)), RULES, V.ADVANCE,
        "6 of 100 requests failed, TTFT p90 0.1 s against 0.1 s",
    ),
    "is not judged by a few requests": (
        HELD, replace(GOOD, canary=answers(9, 9)), RULES, V.ADVANCE,
        "9 of 9 requests failed, TTFT p90 0.1 s against 0.1 s",
    ),
    "is given up when it is slow": (
        HOLDING, replace(GOOD, canary=answers(p90_s=0.2)), RULES, V.GIVE_UP,
        "The canary's TTFT p90 is 0.2 s and that of the revision before 0.1 s; ttftFactor allows "
        "1.5 times as much.",
    ),
    "may be slow where nobody minds": (
        HELD, replace(GOOD, canary=answers(p90_s=0.2)), replace(RULES, ttft_factor=None), V.ADVANCE,
        "0 of 100 requests failed, TTFT p90 0.2 s against 0.1 s",
    ),
    "is not promoted blindly": (
        LAST, replace(GOOD, canary=None, stable=None), RULES, V.WAIT,
        "Canary step 2 of 2 waits: the gateways do not tell how requests fare, and without that "
        "nothing is promoted.",
    ),
    "needs no figures where none are judged": (
        LAST, replace(GOOD, canary=None, stable=None), CanaryRules(steps=STEPS), V.PROMOTE, "",
    ),
    "goes on without traffic": (
        HELD, replace(GOOD, canary=Answers(), stable=Answers()), RULES, V.ADVANCE,
        "0 of 0 requests failed",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("canary", "look", "rules", "verdict", "why"), CASES.values(), ids=CASES)
def test_a_canary(
    canary: Canary, look: CanaryLook, rules: CanaryRules, verdict: Verdict, why: str
) -> None:
    decision = decide_canary(canary, look, rules, now=NOW)
    assert (decision.verdict, decision.why) == (verdict, why)


UNDER_WAY = Rollout(revision="two", stable="one", moved_at=NOW - timedelta(hours=1), canary=HELD)


def applied(verdict: Verdict, canary: Canary, **more: object) -> Rollout:
    rollout = replace(UNDER_WAY, canary=canary, **more)  # type: ignore[arg-type]
    reason = GivenUp.SLOW if verdict is V.GIVE_UP else None
    return apply_decision(rollout, Decision(verdict, "why", reason), RULES, now=NOW)


def test_a_step_that_begins_gives_the_canary_its_share() -> None:
    assert applied(V.START, STARTING).canary == Canary(0, 10, NOW)


def test_the_next_step_keeps_the_share_until_its_replicas_serve() -> None:
    after = applied(V.ADVANCE, HELD)
    assert after.canary == Canary(1, 10, None, "why")
    assert after.moved_at == NOW
    assert applied(V.START, Canary(1, 10, None, "why")).canary == Canary(1, 50, NOW, "why")


def test_a_promoted_canary_is_an_ordinary_rollout() -> None:
    assert applied(V.PROMOTE, LAST) == replace(UNDER_WAY, canary=None, moved_at=NOW)


def test_a_canary_that_is_given_up_says_why_and_when() -> None:
    after = applied(V.GIVE_UP, HOLDING)
    assert (after.canary, after.target) == (None, "one")
    assert after.failure == Failure(GivenUp.SLOW, "why", NOW)


def test_a_paused_canary_takes_no_step_but_is_still_given_up() -> None:
    for verdict in (V.START, V.ADVANCE, V.PROMOTE, V.WAIT):
        assert applied(verdict, HELD, is_paused=True).canary == HELD
    assert applied(V.GIVE_UP, HELD, is_paused=True).failure is not None


def test_a_quantile_is_interpolated_inside_its_bucket() -> None:
    assert quantile({0.1: 50, 0.2: 100, INF: 100}, 0.9) == pytest.approx(0.18)
    assert quantile({0.1: 50, INF: 100}, 0.9) == 0.1
    assert quantile({0.1: 0, INF: 0}, 0.9) is None
    assert quantile({}, 0.9) is None


counts = st.one_of(st.none(), st.builds(answers, st.integers(0, 200), st.integers(0, 200)))


@given(counts, counts, st.integers(0, 3), st.booleans())
def test_no_canary_with_a_known_excess_of_errors_is_ever_promoted(
    canary: Answers | None, stable: Answers | None, step: int, is_starting: bool
) -> None:
    state = Canary(step, 10, None if is_starting else NOW - timedelta(hours=1))
    look = CanaryLook(serving=1, wanted=1, canary=canary, stable=stable, probe=Probe.PASSED)
    decision = decide_canary(state, look, RULES, now=NOW)
    if canary is None or stable is None:
        assert decision.verdict is not V.ADVANCE
    elif canary.requests >= 10 and canary.error_ratio > stable.error_ratio + 0.05 and step < 2:
        assert decision.reason is GivenUp.ERRORS
