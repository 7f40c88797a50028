"""How long less must be needed before a replica goes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from mizzen.operator.planning.scale_history import History, Move, WorkLog
from mizzen.operator.planning.scale_rules import Tuning
from mizzen.operator.planning.steering import down_window_s
from tests.fixtures.scaled_fleet import Fleet, fleet

RISE, FALL = (2, 3), (3, 2)
TURNED_OFTEN = (RISE, FALL) * 3


def history(*steps: tuple[int, int], is_bursty: bool = False, flapping: bool = True) -> History:
    """Return a history of steps a minute apart, flapping until an hour after the last."""
    moves = tuple(
        Move(at_s=60.0 * index, before=before, after=after)
        for index, (before, after) in enumerate(steps)
    )
    return History(
        desired=steps[-1][1],
        moves=moves,
        work=WorkLog(is_bursty=is_bursty),
        flapping_until_s=60.0 * len(steps) + 3600 if flapping else None,
    )


BY_SCHEDULE = Move(at_s=500.0, before=3, after=2, is_steered=False)
RISEN = history(*TURNED_OFTEN, RISE)
WINDOWS = {
    "one window where load seldom turns": (history(RISE, flapping=False), 300.0),
    "two where the next step down would be one more turn": (RISEN, 600.0),
    "one where it goes on falling": (history(*TURNED_OFTEN), 300.0),
    "two where it goes on falling between bursts": (history(*TURNED_OFTEN, is_bursty=True), 600.0),
    "two after a rise that a schedule has cut": (
        replace(RISEN, moves=(*RISEN.moves, BY_SCHEDULE)), 600.0,
    ),
    "one when an hour was calm": (replace(RISEN, flapping_until_s=300.0), 300.0),
}  # fmt: skip


@pytest.mark.parametrize(("past", "window_s"), WINDOWS.values(), ids=WINDOWS)
def test_a_step_down_waits(past: History, window_s: float) -> None:
    tuning = Tuning(down_window_s=300.0)
    assert down_window_s(past, start_s=60.0, tuning=tuning, now_s=600.0) == window_s


def turned_often() -> Fleet:
    """Return a fleet whose load has turned six times, and is high."""
    found = fleet(max_replicas=12)
    found.run(300, per_s=2.0)
    for _ in range(3):
        found.run(120, per_s=24.0)
        found.run(420, per_s=10.0)
    found.run(120, per_s=24.0)
    return found


def test_a_ramp_down_after_many_turns_waits_two_windows_once_and_then_follows() -> None:
    found = turned_often()
    assert found.history.flapping_until_s is not None
    top, since_s = found.decisions[-1].replicas, found.now_s
    for per_s in range(24, 0, -1):
        found.run(60, per_s=per_s)
    falls = [d.at_s for a, d in pairwise(found.decisions) if d.replicas < a.replicas]
    first = next(at_s for at_s in falls if at_s > since_s)
    assert first >= since_s + 600
    # Five minutes ago two were needed, ten minutes ago four.
    assert found.decisions[-1].replicas == 2 < top
