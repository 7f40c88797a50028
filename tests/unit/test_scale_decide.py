"""The autoscaler's decision, walked through with a modelled fleet."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mizzen.operator.planning.scale import Decision, History, Why, decide
from mizzen.operator.planning.scale_rules import Fallback, ScaleRules, Slo, Targets
from mizzen.operator.planning.signals import (
    Engines,
    Observation,
    ReplicaState,
    Signal,
    Traffic,
)
from mizzen.operator.planning.throughput import CostFit, Shape, StepCosts
from tests.fixtures.scaled_fleet import (
    ITL,
    PROMPT_TOKEN_S,
    SEQUENCE_S,
    STEP_S,
    Fleet,
    fleet,
    learned_fleet,
)


def signals(
    *, ready: int, waiting: float = 0, running: float = 0, kv: float = 0, age_s: float = 0
) -> Observation:
    """Return a look without a gateway's arrivals: what plain targets need."""
    return Observation(
        now_s=1000.0,
        replicas=tuple(ReplicaState(name=f"r{n}", age_s=500, is_ready=True) for n in range(ready)),
        traffic=Traffic(arrivals_per_s=Signal(1.0), in_flight=Signal(1.0), held=Signal(0.0)),
        engines=Engines(
            running=Signal(running, age_s),
            waiting=Signal(waiting, age_s),
            kv_used_ratio=Signal(kv, age_s),
        ),
    )


TARGETS: dict[str, tuple[Targets, Observation, int]] = {
    "concurrency shares all requests out": (
        Targets(concurrency=4), signals(ready=2, running=9, waiting=2), 3,
    ),
    "exactly the target is enough": (
        Targets(concurrency=4), signals(ready=2, running=8), 2,
    ),
    "a queue above the target asks for more": (
        Targets(queue=2), signals(ready=2, running=8, waiting=9), 5,
    ),
    "a queue within the target asks for no more": (
        Targets(queue=8), signals(ready=2, running=8, waiting=9), 2,
    ),
    "KV use is the mean over replicas": (
        Targets(kv_used_ratio=0.5), signals(ready=2, running=1, kv=0.9), 4,
    ),
    "of several targets the largest answer wins": (
        Targets(concurrency=100, kv_used_ratio=0.5), signals(ready=2, running=9, kv=0.9), 4,
    ),
    "never above the maximum": (
        Targets(concurrency=1), signals(ready=2, running=90), 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("targets", "seen", "expected"), TARGETS.values(), ids=TARGETS)
def test_plain_targets(targets: Targets, seen: Observation, expected: int) -> None:
    rules = ScaleRules(min_replicas=1, max_replicas=10, targets=targets)
    assert decide(History(desired=2), seen, rules).replicas == expected


def test_costs_are_learned_from_rates_and_give_the_capacity() -> None:
    found = learned_fleet()
    costs = found.history.fit.costs
    assert costs is not None
    assert costs.per_step_s == pytest.approx(STEP_S, rel=0.02)
    # Prompts and answers grow in step here, so only what a whole request costs can be known.
    per_request = costs.per_sequence_s * 200 + costs.per_prompt_token_s * 500
    assert per_request == pytest.approx(SEQUENCE_S * 200 + PROMPT_TOKEN_S * 500, rel=0.02)
    # (1 - 30/120) / 0.15 s: the rate at which steps take 120 ms.
    assert found.decisions[-1].inputs["capacityPerSecond"] == pytest.approx(5.0, rel=0.03)
    assert not found.decisions[-1].is_capacity_unknown


def test_load_that_rises_is_followed_in_one_step() -> None:
    found = learned_fleet()
    before = found.decisions[-1].replicas
    rise = found.tick(25.0)
    assert rise.replicas >= 7 > before
    assert rise.reason is Why.LOAD_ROSE
    assert "ceil(" in rise.formula


def test_replicas_on_their_way_are_not_asked_for_again() -> None:
    found = learned_fleet()
    wanted = found.run(55, per_s=20.0)  # none of the new ones serves yet
    assert wanted[0] >= 5
    assert max(wanted[1:]) - wanted[0] <= 1  # the mean of two minutes catches up, no more


def test_less_load_takes_replicas_away_late_and_by_half() -> None:
    found = learned_fleet()
    found.run(600, per_s=24.0)
    top = found.decisions[-1].replicas
    assert top >= 6
    wanted = [top, *found.run(1800, per_s=1.0)]
    falls = [(a, b) for a, b in pairwise(wanted) if b < a]
    assert wanted[180 // 5 - 1] == top  # a whole window first
    assert all(a - b <= max(1, a // 2) for a, b in falls)
    assert found.decisions[-1].replicas < top


def test_a_step_down_that_would_break_the_limit_is_not_made() -> None:
    """From two replicas to one, each carries twice as much (ai-dynamo/dynamo#9294)."""
    costs, shape = StepCosts(0.03, 0.0005, 0.0001), Shape(500, 500, 200)
    history = History(
        desired=2, fit=CostFit(costs=costs), shape=shape, known_since_s=0.0, load_ratio=0.9
    )
    # Half of the limit is an empty step: at nine tenths of the capacity steps take 0.91 of it.
    seen = Observation(
        now_s=1000.0,
        replicas=tuple(ReplicaState(name=n, age_s=900, is_ready=True) for n in "ab"),
        traffic=Traffic(arrivals_per_s=Signal(2.99), in_flight=Signal(40), held=Signal(0)),
        engines=Engines(running=Signal(40), waiting=Signal(0)),
    )
    rules = ScaleRules(min_replicas=1, max_replicas=4, slo=Slo(itl_s=0.06))
    decision = decide(history, seen, rules)
    assert (decision.replicas, decision.reason) == (2, Why.STEP_DOWN_TOO_SLOW)
    calm = replace(seen, traffic=replace(seen.traffic, arrivals_per_s=Signal(2.0)))
    assert decide(history, calm, rules).replicas == 1


def test_unknown_signals_hold_and_then_fall_back() -> None:
    found = learned_fleet(fallback=Fallback(replicas=5, after_s=300))
    found.is_gateway_known = found.are_engines_known = False
    held = found.run(295, per_s=0.0)
    assert set(held) == {found.decisions[len(found.decisions) - len(held) - 1].replicas}
    assert found.decisions[-1].reason is Why.SIGNALS_UNKNOWN
    assert found.decisions[-1].is_blind
    found.run(20, per_s=0.0)
    assert found.decisions[-1].reason is Why.FALLBACK
    assert found.decisions[-1].replicas == 5


UNSCRAPED = Engines(is_unscraped=True)
KNOWN_TRAFFIC = Traffic(arrivals_per_s=Signal(1.0), in_flight=Signal(1.0), held=Signal(0.0))
WITHOUT_ENGINES: dict[str, tuple[Traffic, Engines, Why]] = {
    "replicas that nobody could scrape yet are awaited": (
        KNOWN_TRAFFIC, UNSCRAPED, Why.AWAITING_SCRAPE,
    ),
    "replicas that should have been scraped are unknown load": (
        KNOWN_TRAFFIC, Engines(), Why.SIGNALS_UNKNOWN,
    ),
    "without a gateway's figures new replicas are unknown load": (
        Traffic(), UNSCRAPED, Why.SIGNALS_UNKNOWN,
    ),
    "with a gateway's old figures new replicas are unknown load": (
        replace(KNOWN_TRAFFIC, in_flight=Signal(1.0, 16)), UNSCRAPED, Why.SIGNALS_UNKNOWN,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("traffic", "engines", "expected"), WITHOUT_ENGINES.values(), ids=WITHOUT_ENGINES
)
@pytest.mark.parametrize("rules", [{"targets": Targets(concurrency=4)}, {"slo": ITL}])
def test_nothing_is_taken_away_and_the_reason_tells_new_replicas_from_lost_metrics(
    rules: dict[str, Slo | Targets], traffic: Traffic, engines: Engines, expected: Why
) -> None:
    seen = replace(signals(ready=3), traffic=traffic, engines=engines)
    config = ScaleRules(min_replicas=0, max_replicas=10, to_zero_after_s=30, **rules)  # type: ignore[arg-type]
    decision = decide(History(desired=3, idle_since_s=0.0), seen, config)
    assert (decision.replicas, decision.reason, decision.is_blind) == (3, expected, True)
    assert decision.is_awaiting_scrape is (expected is Why.AWAITING_SCRAPE)


def test_replicas_that_stay_unscraped_end_at_the_fallback() -> None:
    seen = replace(signals(ready=1), traffic=KNOWN_TRAFFIC, engines=UNSCRAPED)
    rules = ScaleRules(
        min_replicas=1, max_replicas=10, targets=Targets(concurrency=4),
        fallback=Fallback(replicas=5, after_s=300),
    )  # fmt: skip
    decision = decide(History(desired=1, unknown_since_s=700.0), seen, rules)
    assert (decision.replicas, decision.reason) == (5, Why.FALLBACK)


def test_a_gap_in_the_signals_restarts_the_window() -> None:
    found = learned_fleet()
    found.run(300, per_s=24.0)
    top = found.decisions[-1].replicas
    found.run(150, per_s=1.0)
    found.are_engines_known = False
    found.run(20, per_s=1.0)
    found.are_engines_known = True
    assert set(found.run(175, per_s=1.0)) == {top}


def test_old_signals_are_unknown() -> None:
    rules = ScaleRules(min_replicas=1, max_replicas=10, targets=Targets(concurrency=4))
    decision = decide(History(desired=3), signals(ready=3, age_s=16), rules)
    assert (decision.replicas, decision.is_blind) == (3, True)
    assert decision.inputs["running"] is None


def test_live_arrivals_may_raise_while_engines_are_silent() -> None:
    found = learned_fleet()
    found.are_engines_known = False
    decision = found.tick(20.0)
    assert (decision.reason, decision.is_blind) == (Why.LOAD_ROSE, True)


def test_a_queue_of_prompts_is_worked_off() -> None:
    found = learned_fleet()
    seen = found.observe(6.0)
    queued = replace(seen, engines=replace(seen.engines, waiting=Signal(1000.0)))
    decision = decide(found.history, queued, found.rules)
    # 1,000 prompts of 500 tokens at 0.1 ms are 50 s of work, to be gone in 10 s.
    assert decision.replicas >= 6
    assert decision.formula.startswith("drain")


def bursty(promise: float, *, attained: float | None = 1.0) -> Fleet:
    """Return a fleet that has seen half an hour of bursts: ten seconds of every thirty."""
    found = fleet(slo=Slo(itl_s=0.12, attainment_ratio=promise))
    found.attained = attained
    found.run(300, per_s=2.0)
    found.run(300, per_s=6.0)
    for burst in range(60):
        found.run(10, per_s=30.0 if burst % 4 == 0 else 12.0)
        found.run(20, per_s=0.5)
    assert found.history.work.is_bursty
    return found


def test_bursts_make_the_number_a_floor() -> None:
    found = bursty(0.95)
    assert set(found.run(60, per_s=0.5)) == {found.decisions[-1].replicas}
    assert found.decisions[-1].replicas >= 6


def test_a_square_wave_that_is_over_raises_nothing() -> None:
    found = fleet()
    found.run(300, per_s=2.0)
    for _ in range(3):
        found.run(120, per_s=24.0)
        found.run(420, per_s=4.0)
    found.run(120, per_s=24.0)
    found.run(840, per_s=1.0)
    assert found.decisions[-1].replicas == 1
    assert set(found.run(1200, per_s=1.0)) == {1}


def test_a_low_promise_that_is_kept_keeps_fewer_replicas_for_bursts_and_chases_none_above() -> None:
    low = bursty(0.5)
    kept = low.decisions[-1].replicas
    assert kept < bursty(0.95).decisions[-1].replicas
    assert "50 % of the last half hour's" in low.decisions[-1].formula
    assert set(low.run(10, per_s=30.0)) == {kept}


@pytest.mark.parametrize("attained", [0.4, None], ids=["missed", "unknown"])
def test_a_low_promise_that_is_not_kept_spares_nothing(attained: float | None) -> None:
    found, high = bursty(0.5, attained=attained), bursty(0.95, attained=attained)
    assert found.decisions[-1].replicas == high.decisions[-1].replicas


def test_a_burst_that_lasts_is_followed_whatever_the_promise() -> None:
    found = bursty(0.5)
    kept = found.decisions[-1].replicas
    assert max(found.run(180, per_s=30.0)) > kept


def test_a_replica_that_never_starts_is_named_and_made_up_for_once() -> None:
    found = learned_fleet()
    at, serving = found.now_s, found.ready
    found.tick(20.0)
    asked = found.decisions[-1].replicas
    found.never_start = {at}
    found.run(130, per_s=20.0)
    decision = found.decisions[-1]
    assert len(decision.stuck) == asked - serving > 1
    # However many are stuck, one more is asked for: else a broken image would fill the cluster.
    assert decision.replicas <= asked + 2
    assert "for a stuck replica" in decision.formula


def test_an_slo_that_no_number_can_keep_is_told_with_its_numbers() -> None:
    found = learned_fleet(slo=Slo(itl_s=0.02))
    problem = found.decisions[-1].slo_problem
    assert problem is not None
    assert "slo.itlMs is 20 and a step of an empty replica takes 30 ms" in problem
    late = learned_fleet(slo=Slo(ttft_s=0.05)).decisions[-1].slo_problem
    assert late is not None
    assert "slo.ttftMs is 50" in late


def test_the_need_above_the_maximum_is_told() -> None:
    found = learned_fleet(max_replicas=3)
    found.run(60, per_s=40.0)
    decision = found.decisions[-1]
    assert decision.replicas == 3
    assert decision.limited == "The load needs more than the 3 replicas that scaling.max allows."


def test_a_budget_caps_the_number() -> None:
    found = learned_fleet(budget_replicas=2)
    decision = found.tick(40.0)
    assert decision.replicas == 2
    assert decision.limited is not None
    assert "scaling.budget" in decision.limited


@pytest.mark.parametrize(("least", "paid", "run"), [(3, 2, 2), (1, 0, 1), (0, 0, 1)])
def test_a_budget_for_fewer_than_are_asked_for_is_told(least: int, paid: int, run: int) -> None:
    rules = ScaleRules(min_replicas=least, max_replicas=5, budget_replicas=paid)
    decision = decide(History(), signals(ready=1), rules)
    assert decision.replicas == run
    assert decision.limited == (
        f"scaling.budget.gpus pays for {paid} of the at least {max(1, least)} replicas that are "
        f"asked for, and at most {run} may run. Raise it to what they take, or ask for fewer."
    )


def test_a_missed_promise_lowers_the_load_ratio_and_a_kept_one_raises_it() -> None:
    def trimmed(ok: float) -> float | None:
        found = learned_fleet()
        for _ in range(100):
            seen = found.observe(6.0)
            seen = replace(seen, traffic=replace(seen.traffic, itl_ok_ratio=Signal(ok)))
            found.history = decide(found.history, seen, found.rules).state
            found.now_s += 5
        return found.history.load_ratio

    assert trimmed(0.80) == pytest.approx(0.68)
    assert trimmed(0.96) == pytest.approx(0.70)
    assert trimmed(1.00) == pytest.approx(0.72)


def explained(decision: Decision) -> bool:
    return bool(decision.formula and decision.inputs and decision.reason)


def test_every_decision_explains_itself() -> None:
    found = learned_fleet(min_replicas=0, to_zero_after_s=600.0)
    found.run(1800, per_s=0.0)
    assert all(map(explained, found.decisions))
    assert len({decision.reason for decision in found.decisions}) >= 5
