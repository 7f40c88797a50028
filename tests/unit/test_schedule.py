"""Schedules of the autoscaler: bounds that hold by a wall clock."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mizzen.operator.planning.scale_rules import ScaleRules, Schedule
from mizzen.operator.planning.schedule import UnknownTimeZoneError, bounds_now


def schedule(**fields: object) -> Schedule:
    base = {
        "name": "office", "days": frozenset(range(5)), "start_minute": 8 * 60,
        "end_minute": 18 * 60, "min_replicas": 4, "max_replicas": 9, "timezone": "Europe/Berlin",
    }  # fmt: skip
    return Schedule(**(base | fields))  # type: ignore[arg-type]


MOMENTS = {
    "a summer morning, an hour after eight in Berlin": ("2026-07-01T07:00:00", 4),
    "a minute before eight": ("2026-07-01T05:59:00", 1),
    "eight sharp": ("2026-07-01T06:00:00", 4),
    "six sharp is over": ("2026-07-01T16:00:00", 1),
    "in winter the zone is an hour off": ("2026-01-07T06:30:00", 1),
    "a Sunday": ("2026-07-05T09:00:00", 1),
}


@pytest.mark.parametrize(("moment", "low"), MOMENTS.values(), ids=MOMENTS)
def test_a_schedule_holds_by_its_own_wall_clock(moment: str, low: int) -> None:
    rules = ScaleRules(min_replicas=1, max_replicas=5, schedules=(schedule(),))
    at = datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp()
    assert bounds_now(rules, at).low == low


def test_a_time_zone_that_does_not_exist_is_named() -> None:
    rules = ScaleRules(
        min_replicas=1, max_replicas=5, schedules=(schedule(timezone="Europe/Atlantis"),)
    )
    with pytest.raises(UnknownTimeZoneError, match="'Europe/Atlantis', which does not exist"):
        bounds_now(rules, 0.0)
