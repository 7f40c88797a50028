"""What a policy can see: samples of gauges and counters, each a scrape old, and replica counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mizzen.operator.planning.signals import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSample:
    """One ready replica when it was scraped."""

    number: int
    ready_s: float  # how long it has been in service
    running: int
    waiting: int
    waiting_prompt_tokens: int
    kv_tokens: int
    kv_capacity: int
    output_tokens_total: int
    prefilled_tokens_total: int  # prompt tokens computed
    prompted_tokens_total: int  # prompt tokens admitted, cached ones included
    steps_total: int
    step_s_total: float

    @property
    def kv_ratio(self) -> float:
        """Share of the KV cache in use."""
        return self.kv_tokens / self.kv_capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The gateway's counters and every ready replica at one moment; totals never fall."""

    at: float
    requests_total: int  # counted on arrival
    prompt_tokens_total: int  # counted on arrival
    finished_total: int
    finished_prompt_tokens_total: int
    finished_output_tokens_total: int
    ttft_total: int  # first tokens seen
    ttft_met_total: int  # of these, within the objective
    itl_total: int  # requests finished, by their mean ITL
    itl_met_total: int  # of these, within the objective
    held: int  # at the gateway, no replica being ready
    held_prompt_tokens: int
    in_flight: int  # held ones included
    in_flight_s_total: float  # its integral over time: the mean between two samples is exact
    replicas: tuple[ReplicaSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything a policy may know when it is asked."""

    now: float
    samples: Sequence[Sample]  # oldest first; gaps are gaps
    ready: int
    starting: int
    draining: int
    min_replicas: int
    max_replicas: int
    replicas: tuple[ReplicaState, ...]  # those that are ready or starting

    @property
    def current(self) -> int:
        """Replicas that serve or will: what `kubectl get` calls the size."""
        return self.ready + self.starting

    @property
    def last(self) -> Sample | None:
        """The newest sample."""
        return self.samples[-1] if self.samples else None

    def newest_age_s(self) -> float:
        """Return how old the newest sample is; infinite without one."""
        return self.now - self.samples[-1].at if self.samples else float("inf")

    def within(self, window_s: float) -> list[Sample]:
        """Return the samples of the last seconds, oldest first."""
        since = self.now - window_s
        newest_first = []
        for sample in reversed(self.samples):
            if sample.at < since:
                break
            newest_first.append(sample)
        return newest_first[::-1]
