"""The rules an autoscaled deployment is held to, as its user wrote them, and our constants. Pure.

Source of the constants: Kubernetes' HPA, Knative's KPA and Dynamo's planner side by side with a
simulation; docs/scaling.md says what each does.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The promise to clients."""

    ttft_s: float | None = None
    itl_s: float | None = None
    attainment_ratio: float = 0.95

    @property
    def is_set(self) -> bool:
        """Whether the user asked for anything."""
        return self.ttft_s is not None or self.itl_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Plain targets per replica; those that are set are all held."""

    concurrency: float | None = None  # requests running or waiting
    queue: float | None = None  # requests waiting
    kv_used_ratio: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether the user asked for any."""
        return any(t is not None for t in (self.concurrency, self.queue, self.kv_used_ratio))


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Other bounds at some hours of some days, in the time zone's wall clock."""

    days: frozenset[int]  # 0 is Monday
    start_minute: int  # of the day, inclusive
    end_minute: int  # of the day, exclusive; 1440 is midnight
    min_replicas: int
    max_replicas: int
    timezone: str = "UTC"
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """What to run when the signals stay unknown."""

    replicas: int
    after_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Our constants; only the simulator and tests set others."""

    stale_after_s: float = 15.0  # three scrapes
    bucket_s: float = 10.0
    load_ratio: float = 0.7  # how full replicas are planned to be, for the usual promise
    usual_promise: float = 0.95
    load_ratio_per_decade: float = 0.2  # fuller, where ten times as many requests may miss
    peak_ratio: float = 1.0  # how full they may be when work is as high as it may become
    load_ratio_low: float = 0.5
    load_ratio_high: float = 0.9
    trim_step: float = 0.02
    trim_down: float = 0.05  # from what is planned, at most
    trim_up: float = 0.2
    trim_every_s: float = 600.0
    kv_full_ratio: float = 0.85
    trend_cap: float = 2.0  # a trend foretells at most this multiple of now
    rise_quantile: float = 0.95
    burst_enter: float = 0.6
    burst_leave: float = 0.4
    burst_window_s: float = 1800.0
    burst_factor: float = 3.0  # times the quantile: a burst within ten seconds is higher yet
    cover_factor: float = 2.0  # times the level that covers a share of the work, likewise
    memory_s: float = 3600.0
    drain_s: float = 10.0  # a backlog is to be gone in this time
    cold_concurrency: float = 8.0  # per replica, while its capacity is unknown
    default_itl_s: float = 0.1
    down_window_s: float = 300.0
    down_step_ratio: float = 0.5
    down_pause_s: float = 60.0
    down_itl_ratio: float = 0.85  # predicted step time after a step down, of the ITL limit
    reversals_per_hour: int = 4
    default_start_s: float = 120.0
    stuck_after_unmeasured_s: float = 900.0
    recheck_s: float = 5.0  # between holding at the gateway and the step to zero


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleRules:
    """Everything `decide` is configured with."""

    min_replicas: int
    max_replicas: int
    slo: Slo = field(default_factory=Slo)
    targets: Targets = field(default_factory=Targets)
    schedules: tuple[Schedule, ...] = ()
    fallback: Fallback | None = None
    to_zero_after_s: float | None = None  # None: never below one
    budget_replicas: int | None = None  # what spec.scaling.budget pays for
    tuning: Tuning = field(default_factory=Tuning)
