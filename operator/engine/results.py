"""What a reconcile hands back to the worker loop."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is left to do until something changes or the next resync."""


@dataclass(frozen=True, slots=True)
class Requeue:
    """All is well; look again after `after_s` seconds even if nothing changes."""

    after_s: float


@dataclass(frozen=True, slots=True)
class Retryable:
    """Something failed that may work later: try again with growing pauses.

    At the latest after `within_s` seconds, where something else is to be looked at.
    """

    error: Exception
    within_s: float | None = None


@dataclass(frozen=True, slots=True)
class Terminal:
    """Something failed that only a changed resource can mend: status says so, no retry."""

    error: Exception


Result = Done | Requeue | Retryable | Terminal
