"""How the wanted number follows the need: up at once, down late and in small steps. Pure.

The rules against flapping: one window of at least two start-ups must have shown less need, a step
takes at most half away, the step time predicted for what is left must keep the limit, and
after many changes of direction within an hour the next one down needs a window twice as long.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from mizzen.operator.planning import demand, fullness
from mizzen.operator.planning.scale_history import History, Move
from mizzen.operator.planning.scale_rules import Tuning
from mizzen.operator.planning.scale_situation import LOAD_REASONS, Answer, Situation, Why
from mizzen.operator.planning.throughput import step_s

_HOUR_S = 3600.0
_TURN_S = 600.0
_KEPT_MOVES = 32


def remember(history: History, now: Situation) -> History:
    """Return the history with this look's work and need; a gap in the signals restarts windows."""
    tuning, need = now.rules.tuning, now.need
    work = history.work
    # Work guessed from concurrency is no measure that later work could be compared with.
    if need.work is not None and now.sizing.capacity is not None:
        work = demand.record(
            work,
            need.work.replicas,
            now_s=now.now_s,
            start_s=now.sizing.start_s,
            promise=now.rules.slo.attainment_ratio,
            tuning=tuning,
        )
    if not need.is_complete:
        since = now.now_s if history.unknown_since_s is None else history.unknown_since_s
        return replace(history, work=work, needs=(), known_since_s=None, unknown_since_s=since)
    since = now.now_s if history.known_since_s is None else history.known_since_s
    needs = _with_need(history, now)
    grown = replace(history, work=work, needs=needs, known_since_s=since, unknown_since_s=None)
    guarded, attained = _with_flap_guard(grown, now), now.readings.attained_ratio
    return fullness.trim(guarded, attained, now.rules, now_s=now.now_s)


def steer(history: History, now: Situation) -> Answer:
    """Return the number to want, from what is wanted so far and what is needed."""
    if now.current > now.ceiling:
        return Answer(now.ceiling, Why.BOUNDS, f"at most {now.ceiling} replicas")
    wanted = now.bounded(now.need.replicas)
    if wanted > now.current and now.need.candidates:
        return Answer(wanted, Why.LOAD_ROSE, _explain(now, wanted))
    if now.current < now.floor:
        return Answer(now.floor, Why.BOUNDS, f"at least {now.floor} replicas")
    if not now.need.is_complete:
        return _blind(history, now)
    if wanted < now.current:
        return _step_down(history, now, wanted)
    return Answer(now.current, Why.STEADY, _explain(now, wanted))


def noted(history: History, answer: Answer, now_s: float) -> History:
    """Return the history with the answer in it."""
    moves = history.moves
    before = history.desired
    if before is not None and before != answer.replicas:
        move = Move(
            at_s=now_s,
            before=before,
            after=answer.replicas,
            is_steered=answer.reason in LOAD_REASONS,
        )
        moves = (*moves, move)[-_KEPT_MOVES:]
    return replace(history, desired=answer.replicas, moves=moves)


def reversals(moves: tuple[Move, ...], *, since_s: float) -> int:
    """Return how often load turned the direction since then, within ten minutes each time.

    Slower turns follow the load of the day and are no flapping.
    """
    steered = [move for move in moves if move.is_steered and move.at_s >= since_s]
    return sum(
        (a.after > a.before) != (b.after > b.before) and b.at_s - a.at_s < _TURN_S
        for a, b in pairwise(steered)
    )


def down_window_s(history: History, *, start_s: float, tuning: Tuning, now_s: float) -> float:
    """Return how long less must have been needed before anything is taken away."""
    window = max(tuning.down_window_s, 2 * start_s)
    is_flapping = history.flapping_until_s is not None and now_s < history.flapping_until_s
    return 2 * window if is_flapping and not _goes_on_falling(history) else window


def _goes_on_falling(history: History) -> bool:
    """Whether one more step down is no turn, nor likely to be turned by the next burst."""
    steered = [move for move in history.moves if move.is_steered]
    is_falling = bool(steered) and steered[-1].after < steered[-1].before
    return is_falling and not history.work.is_bursty


def _blind(history: History, now: Situation) -> Answer:
    """Hold what there is; after a while run at least the fallback."""
    fallback = now.rules.fallback
    since = history.unknown_since_s if history.unknown_since_s is not None else now.now_s
    if fallback is not None and now.now_s - since >= fallback.after_s:
        count = min(max(now.current, fallback.replicas), now.ceiling)
        formula = f"max({now.current} so far, fallback {fallback.replicas})"
        return Answer(count, Why.FALLBACK, formula)
    if now.is_awaiting_scrape:
        formula = f"{now.current} so far: no replica in service has been scraped yet"
        return Answer(now.current, Why.AWAITING_SCRAPE, formula)
    formula = f"{now.current} so far: unknown signals take nothing away"
    return Answer(now.current, Why.SIGNALS_UNKNOWN, formula)


def _step_down(history: History, now: Situation, wanted: int) -> Answer:
    tuning = now.rules.tuning
    window = down_window_s(history, start_s=now.sizing.start_s, tuning=tuning, now_s=now.now_s)
    known_s = 0.0 if history.known_since_s is None else now.now_s - history.known_since_s
    peak = now.bounded(_peak(history, now.now_s - window))
    has_rested = known_s >= window and not _has_moved(history, now, window_s=window)
    if not has_rested or peak >= now.current:
        formula = (
            f"{_explain(now, wanted)}; the most within {window:.0f} s was {peak}, so "
            f"{now.current} stay"
        )
        return Answer(now.current, Why.HOLDING_WINDOW, formula)
    step = max(1, int(now.current * tuning.down_step_ratio))
    count = max(peak, now.current - step)
    kept = _fewest_in_time(now, count)
    if kept >= now.current:
        formula = f"{_explain(now, wanted)}; {count} could not keep the ITL limit"
        return Answer(now.current, Why.STEP_DOWN_TOO_SLOW, formula)
    formula = f"{_explain(now, wanted)}; the most within {window:.0f} s was {peak}"
    return Answer(kept, Why.LOAD_FELL, formula)


def _fewest_in_time(now: Situation, count: int) -> int:
    """Return the fewest replicas from `count` up whose step time keeps well within the limit."""
    costs, shape = now.sizing.costs, now.sizing.shape
    arrivals = now.readings.arrivals_per_s
    if costs is None or shape is None or arrivals is None:
        return count
    limit = now.rules.tuning.down_itl_ratio * now.sizing.itl_s
    while count < now.current and step_s(costs, shape, requests_per_s=arrivals / count) > limit:
        count += 1
    return count


def _with_need(history: History, now: Situation) -> tuple[tuple[float, int], ...]:
    """Return the needs that may still be the largest of some window: times rise, needs fall."""
    oldest = now.now_s - 2 * max(now.rules.tuning.down_window_s, 2 * now.sizing.start_s)
    need = now.need.replicas
    kept = [(at, count) for at, count in history.needs if count > need and at >= oldest]
    return (*kept, (now.now_s, need))


def _peak(history: History, since_s: float) -> int:
    return max((count for at, count in history.needs if at >= since_s), default=0)


def _has_moved(history: History, now: Situation, *, window_s: float) -> bool:
    """Whether the number rose within the window, for whatever reason, or fell a moment ago."""
    pause_s = now.rules.tuning.down_pause_s
    return any(
        now.now_s - move.at_s < (window_s if move.after > move.before else pause_s)
        for move in history.moves
    )


def _with_flap_guard(history: History, now: Situation) -> History:
    turns = reversals(history.moves, since_s=now.now_s - _HOUR_S)
    if turns <= now.rules.tuning.reversals_per_hour:
        return history
    return replace(history, flapping_until_s=now.now_s + _HOUR_S)


def _explain(now: Situation, wanted: int) -> str:
    """Return the winning rule's formula, and what the bounds and stuck replicas made of it."""
    text = now.need.formula
    if now.extra:
        text += f", and {now.extra} for a stuck replica"
    if wanted != now.need.replicas + now.extra:
        text += f", within {now.floor}..{now.ceiling}: {wanted}"
    return text
