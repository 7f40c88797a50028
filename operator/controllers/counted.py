"""What the gateways counted of a deployment's requests, for those who compare."""

from __future__ import annotations

from mizzen.operator.facts import Facts
from mizzen.operator.metrics.figures import Measured, Name, Target

# Older than three scrapes is unknown, as for the autoscaler.
_FRESH_SCRAPES = 3


async def count_answers(name: Name, facts: Facts) -> Measured | None:
    """Return what was counted, None where that is not known now."""
    measured = (await facts.metrics.collect([Target(name=name, settled=0)]))[name]
    if measured.answers_age_s > _FRESH_SCRAPES * facts.config.metrics_interval_s:
        return None
    return measured
