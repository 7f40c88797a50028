"""What holds for the autoscaler's decision whatever the load does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.operator.planning.scale import History, decide
from mizzen.operator.planning.scale_rules import ScaleRules, Slo
from mizzen.operator.planning.signals import (
    UNKNOWN,
    Engines,
    Observation,
    ReplicaState,
    Signal,
    Traffic,
)
from mizzen.operator.planning.throughput import CostFit, Shape, StepCosts
from tests.fixtures.scaled_fleet import TICK_S, Fleet

WINDOW_S = 180.0
# Phases of a load: how many ticks, how many requests per second, and what can be seen of it.
PHASES = st.lists(
    st.tuples(st.integers(1, 60), st.floats(0, 60), st.booleans(), st.booleans()),
    min_size=1,
    max_size=6,
)


def rules(low: int = 1, high: int = 8) -> ScaleRules:
    return ScaleRules(
        min_replicas=low,
        max_replicas=high,
        slo=Slo(itl_s=0.12),
        to_zero_after_s=None if low else 300.0,
    )


@settings(max_examples=25, deadline=None)
@given(PHASES, st.integers(0, 3), st.integers(0, 5))
def test_the_number_stays_within_its_bounds_and_never_falls_blindly(
    phases: list[tuple[int, float, bool, bool]], low: int, more: int
) -> None:
    fleet = Fleet(rules(low, low + more + 1))
    before = None
    for ticks, load, gateway, engines in phases:
        fleet.is_gateway_known, fleet.are_engines_known = gateway, engines
        for _ in range(ticks):
            decision = fleet.tick(load)
            assert low <= decision.replicas <= low + more + 1
            if decision.is_blind and before is not None:
                assert decision.replicas >= before
            before = decision.replicas


@settings(max_examples=8, deadline=None)
@given(st.integers(4, 90), st.integers(4, 90), st.floats(0.1, 4), st.floats(5, 40))
def test_a_square_wave_turns_the_number_at_most_once_per_window(
    low_ticks: int, high_ticks: int, low: float, high: float
) -> None:
    fleet = Fleet(rules(high=12))
    while fleet.now_s < 2400:
        fleet.run(low_ticks * TICK_S, per_s=low)
        fleet.run(high_ticks * TICK_S, per_s=high)
    numbers = [(decision.at_s, decision.replicas) for decision in fleet.decisions]
    moves = [(at, new > old) for (_, old), (at, new) in pairwise(numbers) if new != old]
    turns = sum(before != after for (_, before), (_, after) in pairwise(moves))
    assert turns <= 1 + fleet.now_s / WINDOW_S
    rises = [at for at, is_rise in moves if is_rise]
    for fall in (at for at, is_rise in moves if not is_rise):
        assert all(fall - rise >= WINDOW_S for rise in rises if rise <= fall)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_taking_a_signal_away_never_takes_a_replica_away(data: st.DataObject) -> None:
    fleet = Fleet(rules())
    fleet.run(300, per_s=2.0)
    fleet.run(300, per_s=data.draw(st.floats(2, 30)))
    seen = fleet.observe(data.draw(st.floats(0, 30)))
    blinded = _without_some(seen, data)
    current = fleet.history.desired
    assert current is not None
    decision = decide(fleet.history, blinded, fleet.rules)
    assert decision.replicas >= min(current, decide(fleet.history, seen, fleet.rules).replicas)
    if decision.is_blind:
        assert decision.replicas >= current


@given(st.floats(0, 60), st.floats(0, 60), st.integers(1, 8))
def test_more_load_never_wants_fewer_replicas(one: float, other: float, current: int) -> None:
    history = History(
        desired=current,
        fit=CostFit(costs=StepCosts(0.03, 0.0005, 0.0001)),
        shape=Shape(500, 500, 200),
    )

    def wanted(load: float) -> int:
        traffic = Traffic(arrivals_per_s=Signal(load), in_flight=Signal(1), held=Signal(0))
        engines = Engines(running=Signal(1), waiting=Signal(0))
        replica = ReplicaState(name="r", age_s=500, is_ready=True)
        seen = Observation(now_s=10.0, replicas=(replica,), traffic=traffic, engines=engines)
        return decide(history, seen, rules()).replicas

    assert wanted(min(one, other)) <= wanted(max(one, other))


def _without_some(seen: Observation, data: st.DataObject) -> Observation:
    def blind(signal: Signal) -> Signal:
        lost = data.draw(st.sampled_from(["kept", "missing", "old"]))
        return {"kept": signal, "missing": UNKNOWN, "old": replace(signal, age_s=60.0)}[lost]

    traffic = replace(
        seen.traffic,
        arrivals_per_s=blind(seen.traffic.arrivals_per_s),
        in_flight=blind(seen.traffic.in_flight),
    )
    engines = replace(
        seen.engines,
        running=blind(seen.engines.running),
        waiting=blind(seen.engines.waiting),
        steps_per_s=blind(seen.engines.steps_per_s),
    )
    return replace(seen, traffic=traffic, engines=engines)
