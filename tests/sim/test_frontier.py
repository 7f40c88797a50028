"""The comparison at equal attainment and at equal GPU-hours."""

from __future__ import annotations

import pytest

from benchmarks.frontier import Point, attained_for, compare, frontier, hours_for

LINE = [Point(10, 0.50), Point(20, 0.90), Point(40, 0.99)]


def test_a_run_that_another_beats_on_both_counts_is_left_out() -> None:
    assert frontier([*reversed(LINE), Point(20, 0.80), Point(45, 0.98)]) == LINE


HOURS = {
    "a run's own attainment costs its own hours": (0.90, 20),
    "half-way between two runs costs half-way": (0.70, 15),
    "less than the cheapest run attains costs what that run does": (0.10, 10),
    "more than any run attains has no price": (0.995, None),
}


@pytest.mark.parametrize(("attainment", "hours"), HOURS.values(), ids=HOURS)
def test_hours_for_an_attainment(attainment: float, hours: float | None) -> None:
    assert hours_for(LINE, attainment) == pytest.approx(hours)


ATTAINED = {
    "a run's own hours attain what it did": (20, 0.90),
    "half-way between two runs attains half-way": (15, 0.70),
    "more than the dearest run attains what that run does": (90, 0.99),
    "fewer hours than any run's attain nothing that is known": (9, None),
}


@pytest.mark.parametrize(("hours", "attainment"), ATTAINED.values(), ids=ATTAINED)
def test_attainment_for_hours(hours: float, attainment: float | None) -> None:
    assert attained_for(LINE, hours) == pytest.approx(attainment)


VERDICTS = {
    "15 % fewer hours at equal attainment save": (Point(24, 0.90), "saves"),
    "five points more at equal hours serve": (Point(22, 0.855), "serves"),
    "less than either is merely ahead": (Point(22, 0.90), "ahead"),
    "half a point less is equal": (Point(50, 0.994), "saves"),
    "as good for fewer hours is not": (Point(18, 0.90), "not ahead"),
    "better than any run is not": (Point(60, 1.0), "not ahead"),
    "better and cheaper than the cheapest is not": (Point(9, 0.60), "not ahead"),
    "cheaper than the cheapest and worse than any promise is another matter": (
        Point(9, 0.05),
        "below the lowest promise",
    ),
}


@pytest.mark.parametrize(("other", "said"), VERDICTS.values(), ids=VERDICTS)
def test_verdict_on_the_line(other: Point, said: str) -> None:
    assert compare(LINE, other) == said


def test_one_run_alone_is_a_line() -> None:
    assert compare(LINE[:1], Point(50, 0.10)) == "saves"
    assert hours_for(LINE[:1], 0.60) is None


def test_who_keeps_a_promise_for_less_than_our_cheapest_run_is_ahead_of_us() -> None:
    assert compare(LINE[2:], Point(39, 0.96)) == "not ahead"
