"""How full replicas are planned to be follows from how many requests may miss their limits."""

from dataclasses import replace

import pytest

from mizzen.operator.planning.fullness import load_ratio, planned_ratio, trim
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules, Slo


def promising(attainment: float) -> ScaleRules:
    slo = Slo(ttft_s=2.0, itl_s=0.1, attainment_ratio=attainment)
    return ScaleRules(min_replicas=1, max_replicas=10, slo=slo)


PLANNED = {
    0.0: 0.9,
    0.1: 0.9,
    0.5: 0.9,
    0.8: 0.82,
    0.9: 0.76,
    0.95: 0.7,
    0.99: 0.56,
    0.999: 0.5,
    1.0: 0.5,
}


@pytest.mark.parametrize(("promise", "ratio"), PLANNED.items())
def test_replicas_are_planned_the_fuller_the_less_is_promised(promise: float, ratio: float) -> None:
    assert planned_ratio(promising(promise)) == pytest.approx(ratio, abs=0.001)
    assert load_ratio(History(), promising(promise)) == planned_ratio(promising(promise))


BOUNDED = {
    "kept as far as it was trimmed": (0.95, 0.74, 0.74),
    "no emptier than the plan allows": (0.5, 0.6, 0.85),
    "no fuller than the plan allows": (0.99, 0.9, 0.76),
    "never fuller than the most": (0.8, 1.0, 0.9),
}


@pytest.mark.parametrize(("promise", "learned", "expected"), BOUNDED.values(), ids=BOUNDED)
def test_what_was_learned_under_another_promise_is(
    promise: float, learned: float, expected: float
) -> None:
    history = History(load_ratio=learned)
    assert load_ratio(history, promising(promise)) == pytest.approx(expected, abs=0.001)


def trimmed(ratio: float | None, attained: float | None, *, promise: float = 0.95) -> float | None:
    history = replace(History(load_ratio=ratio), trimmed_at_s=0.0)
    return trim(history, attained, promising(promise), now_s=600.0).load_ratio


def test_a_trim_begins_at_the_plan_and_ends_at_its_bounds() -> None:
    assert trimmed(None, 0.90) == pytest.approx(0.68)
    assert trimmed(0.66, 0.90) == pytest.approx(0.65)
    assert trimmed(0.89, 1.0) == pytest.approx(0.9)
    assert trimmed(None, 1.0, promise=0.99) == pytest.approx(planned_ratio(promising(0.99)) + 0.02)
    assert trimmed(0.7, None) == 0.7, "what is unknown moves nothing"


def test_a_trim_waits_for_the_last_one_to_show() -> None:
    history = History(load_ratio=0.7, trimmed_at_s=100.0)
    early = trim(history, 0.5, promising(0.95), now_s=600.0)
    assert early is history
    assert trim(replace(history, trimmed_at_s=None), 0.5, promising(0.95), now_s=9.0) == replace(
        history, trimmed_at_s=9.0
    )
