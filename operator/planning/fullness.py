"""How full replicas are planned to be: by what is promised, and by what was attained. Pure."""

from __future__ import annotations

import math
from dataclasses import replace

from mizzen.operator.planning.scale_history import History
from mizzen.operator.planning.scale_rules import ScaleRules

# Attainment this much above the promise counts as met with room to spare.
_SPARE_RATIO = 0.5


def planned_ratio(rules: ScaleRules) -> float:
    """Return the load ratio to begin with: the more requests may miss their limits, the fuller.

    On a ramp of recorded conversation, replicas planned to be full to 0.5, 0.7 and 0.9 missed
    0.1, 0.6 and 7 % of them: a line over the logarithm of what is missed. Ours leaves room for
    loads that are harder to follow.
    """
    tuning = rules.tuning
    missed = (1 - rules.slo.attainment_ratio) / (1 - tuning.usual_promise)
    if missed <= 0:
        return tuning.load_ratio_low
    ratio = tuning.load_ratio + tuning.load_ratio_per_decade * math.log10(missed)
    return min(tuning.load_ratio_high, max(tuning.load_ratio_low, ratio))


def load_ratio(history: History, rules: ScaleRules) -> float:
    """Return the load ratio of now: the planned one, as far as it was trimmed."""
    if history.load_ratio is None:
        return planned_ratio(rules)
    # What was learned under another promise may lie far away.
    return _bounded(history.load_ratio, rules)


def trim(history: History, attained: float | None, rules: ScaleRules, *, now_s: float) -> History:
    """Return the history with the load ratio moved a little toward the promised attainment.

    `attained` is the share of requests that kept their limits, None where it is unknown.
    """
    tuning, slo = rules.tuning, rules.slo
    at = history.trimmed_at_s
    if at is None:
        return replace(history, trimmed_at_s=now_s)
    if attained is None or not slo.is_set or now_s - at < tuning.trim_every_s:
        return history
    ratio = load_ratio(history, rules)
    spare = slo.attainment_ratio + _SPARE_RATIO * (1 - slo.attainment_ratio)
    if attained < slo.attainment_ratio:
        ratio -= tuning.trim_step
    elif attained > spare:
        ratio += tuning.trim_step
    return replace(history, load_ratio=_bounded(ratio, rules), trimmed_at_s=now_s)


def _bounded(ratio: float, rules: ScaleRules) -> float:
    planned, tuning = planned_ratio(rules), rules.tuning
    highest = min(tuning.load_ratio_high, planned + tuning.trim_up)
    return min(highest, max(planned - tuning.trim_down, ratio))
