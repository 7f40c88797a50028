"""What the autoscaler decides on: signals with three states, and the state of the fleet. Pure.

A signal has a value, is zero, or is unknown. "No data" read as zero is the commonest accident of
autoscalers (kedacore/keda#3065), so unknown is a state of its own and never scales anything down.
All times are seconds of one clock that the caller hands over; the simulator has its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Signal:
    """One figure and its age; a `value` of None is unknown."""

    value: float | None = None
    age_s: float = 0.0

    def fresh(self, stale_after_s: float) -> float | None:
        """Return the value, or None where there is none or it is too old to act on."""
        return self.value if self.age_s <= stale_after_s else None


UNKNOWN = Signal()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What the gateways saw of this model, summed over gateways. Exists at zero replicas too."""

    arrivals_per_s: Signal = UNKNOWN  # counted on arrival, mean of the last 30 s
    in_flight: Signal = UNKNOWN  # requests being answered, held ones included
    held: Signal = UNKNOWN  # requests that wait for a replica
    ttft_ok_ratio: Signal = UNKNOWN  # answers whose first token met slo.ttft_s, last 5 min
    itl_ok_ratio: Signal = UNKNOWN  # token gaps within slo.itl_s, last 5 min


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What the replicas in service said, summed over them where not said otherwise."""

    running: Signal = UNKNOWN  # sequences being computed
    waiting: Signal = UNKNOWN  # requests queued in the engines
    kv_used_ratio: Signal = UNKNOWN  # mean over replicas
    kv_tokens: Signal = UNKNOWN  # room for tokens in one replica's KV cache
    prompt_tokens: Signal = UNKNOWN  # mean per finished request, last 5 min
    output_tokens: Signal = UNKNOWN  # mean per finished request, last 5 min
    # Rates over the last 30 s, from which the cost of a step is fitted.
    steps_per_s: Signal = UNKNOWN
    step_seconds_per_s: Signal = UNKNOWN  # seconds spent in steps: busy replicas
    decoded_per_s: Signal = UNKNOWN  # output tokens
    prefilled_per_s: Signal = UNKNOWN  # prompt tokens computed, those found in the cache left out
    prompted_per_s: Signal = UNKNOWN  # prompt tokens asked for, cached ones included
    # The source answers, knows none of them yet, and none has served long enough to be expected.
    is_unscraped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaState:
    """One replica that counts: neither draining nor being deleted."""

    name: str
    age_s: float
    is_ready: bool
    # Seconds from its creation to its first request's admission; None while it starts.
    start_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wake:
    """The gateway's wish for a replica; `token` differs from wish to wish."""

    token: str = ""
    held: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look at a deployment."""

    now_s: float
    replicas: tuple[ReplicaState, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)
    engines: Engines = field(default_factory=Engines)
    wake: Wake = field(default_factory=Wake)

    @property
    def ready(self) -> int:
        """Replicas in service."""
        return sum(replica.is_ready for replica in self.replicas)
