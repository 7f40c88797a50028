"""To zero and back. Pure.

Going to zero takes two looks: first the gateways hold new requests, then, when still none has
come, the last replica goes. So no request is ever sent to a replica that is being taken away.
"""

from __future__ import annotations

from dataclasses import replace

from mizzen.operator.planning.need import first_size
from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_situation import Answer, Situation, Why


def can_be_zero(now: Situation) -> bool:
    """Whether the user allows no replica at all at this moment."""
    return now.rules.to_zero_after_s is not None and now.bounds.low == 0


def follow_idleness(history: History, now: Situation) -> History:
    """Return the history with since when the deployment has been idle."""
    is_woken = now.seen.wake.token != history.wake_token
    is_idle = now.readings.is_silent is True and not is_woken
    if not is_idle or not can_be_zero(now):
        return replace(history, idle_since_s=None, holding_since_s=None)
    since = now.now_s if history.idle_since_s is None else history.idle_since_s
    return replace(history, idle_since_s=since)


def toward_zero(history: History, now: Situation) -> tuple[Answer, History] | None:
    """Return the step to zero that is due, None while there is none."""
    after_s, since = now.rules.to_zero_after_s, history.idle_since_s
    if after_s is None or since is None or now.now_s - since < after_s:
        return None
    holding_since = now.now_s if history.holding_since_s is None else history.holding_since_s
    history = replace(history, holding_since_s=holding_since)
    if now.now_s - holding_since < now.rules.tuning.recheck_s:
        formula = f"no request for {after_s:.0f} s; new ones are held while this is checked again"
        return Answer(now.current, Why.RECHECKING_IDLE, formula, is_holding=True), history
    formula = f"no request for {after_s:.0f} s, nor since new ones are held"
    return Answer(0, Why.IDLE, formula), replace(history, holding_since_s=None)


def from_zero(history: History, now: Situation) -> Answer:
    """Return the answer for a deployment that has no replica."""
    if not can_be_zero(now):
        return Answer(now.floor, Why.BOUNDS, f"at least {now.floor} replicas")
    readings, wake = now.readings, now.seen.wake
    is_woken = wake.token != history.wake_token
    is_asked = any((readings.held, readings.arrivals_per_s, readings.in_flight))
    if not (is_woken or is_asked):
        return Answer(0, Why.IDLE, "no request")
    held = max(wake.held if is_woken else 0, readings.held or 0.0)
    size = first_size(held, history, now.rules, now.sizing)
    return Answer(now.bounded(size.replicas), Why.WOKEN, size.formula)
