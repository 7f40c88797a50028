"""Which bounds hold now: the user's, a schedule's or the budget's. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from mizzen.operator.planning.scale_rules import ScaleRules, Schedule


class UnknownTimeZoneError(ValueError):
    """A schedule names a time zone that does not exist."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"scaling.schedules names the time zone {name!r}, which does not exist. Write one of "
            "the IANA names, such as Europe/Berlin or UTC."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The fewest and most replicas now."""

    low: int
    high: int
    schedule: str = ""  # the one that holds, if any
    is_budget: bool = False  # the budget is what limits
    unpaid: int = 0  # the fewest asked for, where the budget does not pay for so many


def find_time_zone(name: str) -> ZoneInfo:
    """Return the time zone.

    Raises:
        UnknownTimeZoneError: there is none of this name.
    """
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise UnknownTimeZoneError(name) from error


def bounds_now(rules: ScaleRules, now_s: float) -> Bounds:
    """Return the bounds that hold at this moment (seconds since 1970).

    Raises:
        UnknownTimeZoneError: a schedule cannot be read.
    """
    low, high, name = rules.min_replicas, rules.max_replicas, ""
    for schedule in rules.schedules:
        if is_active(schedule, now_s):
            low, high, name = schedule.min_replicas, schedule.max_replicas, schedule.name
            break
    budget = rules.budget_replicas
    if budget is not None and budget < high:
        fewest = max(1, low)
        return Bounds(
            low=min(low, budget),
            high=budget,
            schedule=name,
            is_budget=True,
            unpaid=fewest if budget < fewest else 0,
        )
    return Bounds(low=low, high=high, schedule=name)


def is_active(schedule: Schedule, now_s: float) -> bool:
    """Whether the moment lies in the schedule, by the wall clock of its time zone."""
    local = datetime.fromtimestamp(now_s, UTC).astimezone(find_time_zone(schedule.timezone))
    minute = local.hour * 60 + local.minute
    return local.weekday() in schedule.days and (
        schedule.start_minute <= minute < schedule.end_minute
    )
