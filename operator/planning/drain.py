"""When a draining replica may be deleted. Pure: the asking is done elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

# After the gate was closed it takes a moment until every proxy has heard of it. Until then a
# runtime without requests may still get one.
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Drain:
    """A replica on its way out: since when, and what it said last."""

    since: datetime
    is_running: bool  # its leader's process lives, so there may be requests
    in_flight: int | None = None  # None: not asked yet, or no answer


def is_drained(drain: Drain, *, max_s: int, now: datetime) -> bool:
    """Whether nothing more is to be waited for."""
    if not drain.is_running or now >= drain.since + timedelta(seconds=max_s):
        return True
    return drain.in_flight == 0 and now >= drain.since + timedelta(seconds=SETTLE_S)
