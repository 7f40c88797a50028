"""KEDA's Prometheus scaler with an AverageValue, which drives an HPA on an external metric."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from mizzen.operator.simulator.policies.hpa import SYNC_S, TOLERANCE, Stabilization
from mizzen.operator.simulator.signals import View

_STALE_S = 45.0  # three scrapes


def average_value_replicas(total: float, *, current: int, target: float) -> int:
    """Return ceil(total/target), outside the tolerance around current x target.

    Source: kubernetes: pkg/controller/podautoscaler/replica_calculator.go,
    GetExternalPerPodMetricReplicas; kedacore/keda-docs: content/docs/2.21/concepts.
    """
    if current and abs(total / (target * current) - 1) <= TOLERANCE:
        return current
    return ceil(total / target - 1e-9)


@dataclass(slots=True)
class KedaConcurrency:
    """Running plus waiting requests of all replicas, so many for each replica.

    An empty query result is taken as zero: `ignoreNullValues` is true unless changed
    (kedacore/keda#3065), so a metrics outage shrinks the deployment.
    """

    target: float = 18.0
    name: str = "keda-concurrency"
    stabilization: Stabilization = field(default_factory=Stabilization)
    interval_s: float = SYNC_S
    scrape_s: float = SYNC_S
    window_s: float = SYNC_S

    def wanted(self, view: View) -> int:
        """Return the size after this sync."""
        last = view.last
        total = 0.0
        if last is not None and view.newest_age_s() <= _STALE_S:
            total = sum(replica.running + replica.waiting for replica in last.replicas)
        wish = average_value_replicas(total, current=view.current, target=self.target)
        return self.stabilization.settle(wish, current=view.current, now=view.now)
