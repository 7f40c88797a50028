"""The autoscaler's decision at zero: when it goes there, and with how many it comes back."""

from __future__ import annotations

from dataclasses import replace

from mizzen.operator.planning.scale import History, Why, decide
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.signals import Observation, Signal, Traffic, Wake
from mizzen.operator.planning.throughput import CostFit, Shape, StepCosts
from tests.fixtures.scaled_fleet import ITL, fleet

ZERO = {"min_replicas": 0, "to_zero_after_s": 600.0}


def test_an_idle_deployment_holds_then_checks_again_then_goes_to_zero() -> None:
    found = fleet(**ZERO)
    found.run(200, per_s=1.0)
    decisions = [found.tick(0.0) for _ in range(130)]
    reasons = [decision.reason for decision in decisions]
    first = reasons.index(Why.RECHECKING_IDLE)
    assert first == 600 // 5
    assert decisions[first].is_holding
    assert decisions[first].replicas >= 1
    assert (decisions[first + 1].replicas, decisions[first + 1].reason) == (0, Why.IDLE)


def test_a_wake_during_the_check_keeps_the_replica() -> None:
    found = fleet(**ZERO)
    found.run(200, per_s=1.0)
    while not found.tick(0.0).is_holding:
        pass
    found.wake = Wake(token="2026-09-01T12:00:00Z;held=1", held=1)
    decision = found.tick(0.0)
    assert (decision.replicas, decision.is_holding) == (1, False)


def test_unknown_signals_never_lead_to_zero() -> None:
    found = fleet(**ZERO)
    found.run(200, per_s=1.0)
    found.is_gateway_known = False
    assert 0 not in found.run(3600, per_s=0.0)


def at_zero(**fields: object) -> History:
    return replace(History(desired=0, wake_token="old"), **fields)  # type: ignore[arg-type]


def look(*, held: int = 0, token: str = "old", traffic: Traffic | None = None) -> Observation:
    quiet = Traffic(arrivals_per_s=Signal(0.0), in_flight=Signal(0.0), held=Signal(0.0))
    wake = Wake(token=token, held=held)
    return Observation(now_s=5000.0, traffic=quiet if traffic is None else traffic, wake=wake)


def test_zero_stays_zero_until_somebody_asks() -> None:
    rules = ScaleRules(min_replicas=0, max_replicas=8, to_zero_after_s=600)
    assert decide(at_zero(), look(), rules).replicas == 0
    assert decide(at_zero(), look(traffic=Traffic()), rules).replicas == 0
    asked = Traffic(arrivals_per_s=Signal(0.0), in_flight=Signal(1.0), held=Signal(1.0))
    assert decide(at_zero(), look(traffic=asked), rules).replicas == 1


def test_the_first_size_follows_from_the_held_work() -> None:
    rules = ScaleRules(min_replicas=0, max_replicas=8, to_zero_after_s=600, slo=ITL)
    decision = decide(at_zero(), look(held=3, token="new"), rules)
    assert (decision.replicas, decision.reason) == (1, Why.WOKEN)
    assert decide(at_zero(), look(held=20, token="new"), rules).replicas == 3  # 8 requests each
    known = at_zero(fit=CostFit(costs=StepCosts(0.03, 0.0005, 0.0001)), shape=Shape(500, 500, 200))
    # A replica serves 5 requests per second, so 150 held ones are 30 s of work: 10 s each.
    assert decide(known, look(held=150, token="new"), rules).replicas == 3


def test_a_wake_is_answered_once() -> None:
    rules = ScaleRules(min_replicas=0, max_replicas=8, to_zero_after_s=600)
    first = decide(at_zero(), look(held=1, token="new"), rules)
    again = decide(replace(first.state, desired=0), look(held=1, token="new"), rules)
    assert (first.replicas, again.replicas) == (1, 0)


def test_a_wake_is_not_undone_because_zero_was_enough_for_long() -> None:
    found = fleet(**ZERO)
    found.run(200, per_s=1.0)
    found.run(1200, per_s=0.0)
    assert found.decisions[-1].replicas == 0
    found.wake = Wake(token="2026-09-01T13:00:00Z;held=30", held=30)
    first = found.tick(0.0).replicas
    assert first > 1
    assert set(found.run(170, per_s=0.5)) == {first}


def test_one_replica_runs_again_when_zero_is_allowed_no_more() -> None:
    rules = ScaleRules(min_replicas=1, max_replicas=8)
    decision = decide(at_zero(), look(), rules)
    assert (decision.replicas, decision.reason) == (1, Why.BOUNDS)
