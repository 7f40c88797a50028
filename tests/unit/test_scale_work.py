"""How much work there is, and the formula that tells a person where the figure is from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mizzen.operator.planning.readings import Readings, Sizing
from mizzen.operator.planning.throughput import Capacity, Shape, StepCosts
from mizzen.operator.planning.work import offered_work

READINGS = Readings(
    ready=2,
    arrivals_per_s=11.0,
    in_flight=20.0,
    held=0.0,
    running=16.0,
    waiting=0.0,
    kv_used_ratio=0.1,
    step_s=0.06,
    decoded_per_s=2000.0,
    prefilled_per_s=5000.0,
)
KNOWN = Sizing(
    costs=StepCosts(0.03, 0.000375, 0.00015),
    shape=Shape(500, 500, 200),
    capacity=Capacity(requests_per_s=5.0, bound="compute"),
    itl_s=0.12,
    concurrency=8.0,
    start_s=60.0,
)
GUESSED = replace(KNOWN, capacity=None)
ARRIVING = "11 arriving per s / 5 each"
SERVED = (
    "(2000 tokens per s x 0.375 ms + 5000 of prompts x 0.15 ms) / "
    "(1 - 30 ms of an empty step / 120 ms ITL)"
)

CASES = {
    "what engines do, where they keep up": (READINGS, KNOWN, 2.0, SERVED),
    "what arrives, where requests wait": (replace(READINGS, waiting=3.0), KNOWN, 2.2, ARRIVING),
    "what arrives, where steps are too long": (replace(READINGS, step_s=0.2), KNOWN, 2.2, ARRIVING),
    "what engines do, where that is more than arrives": (
        replace(READINGS, waiting=3.0, arrivals_per_s=5.0),
        KNOWN,
        2.0,
        SERVED,
    ),
    "what arrives, where engines tell no tokens": (
        replace(READINGS, decoded_per_s=None),
        KNOWN,
        2.2,
        ARRIVING,
    ),
    "steps, before the capacity is known": (
        READINGS,
        GUESSED,
        1.0,
        "2 ready x 60 ms of a step / 120 ms ITL",
    ),
    "requests, before the capacity is known and where some wait": (
        replace(READINGS, waiting=4.0),
        GUESSED,
        2.5,
        "20 in replicas / 8 each",
    ),
}


@pytest.mark.parametrize(("readings", "sizing", "replicas", "formula"), CASES.values(), ids=CASES)
def test_work_is(readings: Readings, sizing: Sizing, replicas: float, formula: str) -> None:
    work = offered_work(readings, sizing)
    assert work is not None
    assert work.replicas == pytest.approx(replicas)
    assert work.formula == formula


def test_work_is_unknown_without_arrivals_or_without_requests() -> None:
    assert offered_work(replace(READINGS, arrivals_per_s=None), KNOWN) is None
    assert offered_work(replace(READINGS, running=None), GUESSED) is None
