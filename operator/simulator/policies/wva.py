"""llm-d's Workload Variant Autoscaler, saturation analyzer (V1), with the HPA that acts on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mizzen.operator.simulator.policies.hpa import Stabilization
from mizzen.operator.simulator.signals import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The highest values of one replica in the last minute."""

    kv_ratio: float
    waiting: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """When a replica is full, and how much is to be spare on average."""

    kv_ratio: float = 0.80
    waiting: float = 5.0
    spare_kv_ratio: float = 0.10
    spare_waiting: float = 3.0


def saturation_target(peaks: Sequence[Peak], *, starting: int, limits: Thresholds) -> int:
    """Return the wanted size: one more, one fewer, or what there is.

    Source: llm-d/llm-d-workload-variant-autoscaler: docs/saturation-analyzer.md, steps 1 to 5.
    """
    current = len(peaks) + starting
    open_ = [p for p in peaks if p.kv_ratio < limits.kv_ratio and p.waiting < limits.waiting]

    def has_spare(among: int) -> bool:
        kv = limits.kv_ratio - sum(p.kv_ratio for p in open_) / among
        waiting = limits.waiting - sum(p.waiting for p in open_) / among
        return kv >= limits.spare_kv_ratio and waiting >= limits.spare_waiting

    if not open_ or not has_spare(len(open_)):
        # A replica that is on its way is the answer to this already.
        return current + (1 if starting == 0 else 0)
    if len(open_) >= 2 and starting == 0 and has_spare(len(open_) - 1):
        return current - 1
    return current


@dataclass(slots=True)
class Wva:
    """One replica up or down a minute by peaks of KV use and queue; held down for 300 s."""

    limits: Thresholds = field(default_factory=Thresholds)
    name: str = "wva"
    stabilization: Stabilization = field(default_factory=Stabilization)
    interval_s: float = 60.0
    scrape_s: float = 5.0
    window_s: float = 60.0

    def wanted(self, view: View) -> int:
        """Return the size after this round; without metrics it stays."""
        peaks: dict[int, Peak] = {}
        for sample in view.within(self.window_s):
            for replica in sample.replicas:
                before = peaks.get(replica.number, Peak(kv_ratio=0.0, waiting=0))
                peaks[replica.number] = Peak(
                    kv_ratio=max(before.kv_ratio, replica.kv_ratio),
                    waiting=max(before.waiting, replica.waiting),
                )
        last = view.last
        alive = {replica.number for replica in last.replicas} if last else set()
        counted = [peak for number, peak in peaks.items() if number in alive]
        if not counted:
            return view.current
        wish = saturation_target(counted, starting=view.starting, limits=self.limits)
        return self.stabilization.settle(wish, current=view.current, now=view.now)
