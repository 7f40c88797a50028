"""What the autoscaler remembers between two decisions. Pure values; `decide` returns the next.

The caller keeps it as it is. What must survive a restart (moves, costs, start-up times, load
ratio) is written to status; the windows are filled anew, and until they are nothing is taken away.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mizzen.operator.planning.throughput import CostFit, Shape

Identity = tuple[str, int]  # a replica's name and the second in which it was made


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One change of the wanted number."""

    at_s: float
    before: int
    after: int
    # Steered by load. Moves that follow bounds, schedules or a wake are no sign of flapping.
    is_steered: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkLog:
    """Offered work in replicas, in buckets of ten seconds, oldest first."""

    buckets: tuple[float, ...] = ()
    opened_s: float | None = None
    total: float = 0.0
    count: int = 0
    rise: float = 0.0  # quantile of the rises within one start-up, kept between two buckets
    is_bursty: bool = False
    burst_floor: float = 0.0
    covered: float = 0.0  # the promised share of bursty work lies below this level


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """All that earlier decisions leave to the next."""

    desired: int | None = None  # None before the first decision
    work: WorkLog = field(default_factory=WorkLog)
    # (when, need) with needs falling: the maximum over any window is one look-up.
    needs: tuple[tuple[float, int], ...] = ()
    known_since_s: float | None = None
    unknown_since_s: float | None = None
    idle_since_s: float | None = None
    holding_since_s: float | None = None
    wake_token: str = ""  # the last wake that was looked at
    moves: tuple[Move, ...] = ()
    flapping_until_s: float | None = None
    fit: CostFit = field(default_factory=CostFit)
    shape: Shape | None = None
    kv_tokens: float | None = None
    starts: tuple[float, ...] = ()  # seconds from a replica's creation until it served
    started: frozenset[Identity] | None = None  # whose start is among them; None before any look
    load_ratio: float | None = None
    trimmed_at_s: float | None = None
