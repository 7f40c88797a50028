"""One look at a deployment, read and sized: what the steps of a scaling decision share. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mizzen.operator.planning.need import Need
from mizzen.operator.planning.readings import Readings, Sizing
from mizzen.operator.planning.scale_rules import ScaleRules
from mizzen.operator.planning.schedule import Bounds
from mizzen.operator.planning.signals import Observation


class Why(StrEnum):
    """Why the number is what it is."""

    STEADY = "Steady"
    LOAD_ROSE = "LoadRose"
    LOAD_FELL = "LoadFell"
    HOLDING_WINDOW = "HoldingWindow"  # less is needed, but not for long enough
    STEP_DOWN_TOO_SLOW = "StepDownTooSlow"  # fewer could not keep the ITL limit
    SIGNALS_UNKNOWN = "SignalsUnknown"
    AWAITING_SCRAPE = "AwaitingScrape"  # replicas are too new for their figures to be there
    FALLBACK = "Fallback"
    BOUNDS = "Bounds"
    WOKEN = "Woken"
    RECHECKING_IDLE = "RecheckingIdle"  # requests are held, to see whether any comes
    IDLE = "Idle"


# Moves for other reasons are no sign that the load makes the number flap.
LOAD_REASONS = (Why.LOAD_ROSE, Why.LOAD_FELL)


@dataclass(frozen=True, slots=True)
class Answer:
    """A number with its reason, and the formula with its numbers."""

    replicas: int
    reason: Why
    formula: str
    is_holding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Everything one decision looks at."""

    seen: Observation
    rules: ScaleRules
    bounds: Bounds
    readings: Readings
    sizing: Sizing
    need: Need
    extra: int  # replicas to make up for stuck ones
    current: int  # what was wanted so far

    @property
    def now_s(self) -> float:
        """The moment of the look."""
        return self.seen.now_s

    @property
    def is_awaiting_scrape(self) -> bool:
        """Whether all that is missing is the first scrape of replicas that have just come."""
        told = self.readings
        is_traffic_known = None not in (told.arrivals_per_s, told.in_flight, told.held)
        return not self.need.is_complete and self.seen.engines.is_unscraped and is_traffic_known

    @property
    def floor(self) -> int:
        """The fewest replicas while the deployment is not idle."""
        return max(1, self.bounds.low)

    @property
    def ceiling(self) -> int:
        """The most replicas."""
        return max(self.floor, self.bounds.high)

    def bounded(self, need: int) -> int:
        """Return what to want for this need."""
        return min(max(need, self.floor) + self.extra, self.ceiling)
