"""Kubernetes' HorizontalPodAutoscaler v2 on a metric of the pods, as in autoscaling/v2."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

from mizzen.operator.simulator.signals import ReplicaSample, View

SYNC_S = 15.0
TOLERANCE = 0.1
_DATA_IS_GONE_S = 60.0


@dataclass(slots=True)
class Stabilization:
    """The default `behavior`: up at once but bounded, down to the highest wish of five minutes.

    Source: kubernetes/website, tasks/run-application/horizontal-pod-autoscale.md, "Default
    behavior" (up: the larger of +4 pods and +100 % in 15 s; down: 100 % in 15 s, stabilised over
    300 s), and kubernetes: pkg/controller/podautoscaler/horizontal.go.
    """

    down_s: float = 300.0
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)

    def settle(self, wish: int, *, current: int, now: float) -> int:
        """Return what is really set, given what the metric asks for."""
        self._wishes.append((now, wish))
        while self._wishes[0][0] < now - self.down_s:
            self._wishes.popleft()
        if wish >= current:
            return min(wish, max(current + 4, current * 2))
        return min(current, max(wish for _, wish in self._wishes))


def plain_metric_replicas(
    values: Sequence[float], *, unready: int, current: int, target: float
) -> int:
    """Return ceil(current x mean/target), outside the tolerance.

    Going up, pods that are not ready count as idle; if that turns the ratio around, nothing is
    done. Source: kubernetes: pkg/controller/podautoscaler/replica_calculator.go,
    calcPlainMetricReplicas.
    """
    ratio = sum(values) / len(values) / target
    counted = len(values)
    if unready and ratio > 1:
        counted += unready
        ratio = sum(values) / counted / target
        if ratio < 1:
            return current
    if abs(ratio - 1) <= TOLERANCE:
        return current
    wish = ceil(ratio * counted - 1e-9)
    has_turned = (ratio < 1 and wish > current) or (ratio > 1 and wish < current)
    return current if has_turned else wish


@dataclass(slots=True)
class HpaOnPods:
    """An HPA on one gauge of the pods, averaged over those that are ready.

    Without metrics it keeps the current size, as the controller does on an error.
    """

    gauge: Callable[[ReplicaSample], float]
    target: float
    name: str = "hpa"
    stabilization: Stabilization = field(default_factory=Stabilization)
    interval_s: float = SYNC_S
    scrape_s: float = SYNC_S
    window_s: float = SYNC_S

    def wanted(self, view: View) -> int:
        """Return the size after this sync."""
        last = view.last
        if last is None or view.newest_age_s() > _DATA_IS_GONE_S or not last.replicas:
            return view.current
        wish = plain_metric_replicas(
            [self.gauge(replica) for replica in last.replicas],
            unready=view.starting,
            current=view.current,
            target=self.target,
        )
        return self.stabilization.settle(wish, current=view.current, now=view.now)


def on_queue(target: float = 5.0) -> HpaOnPods:
    """Return an HPA on the mean number of waiting requests."""
    return HpaOnPods(lambda replica: replica.waiting, target, name="hpa-queue")


def on_kv(target: float = 0.5) -> HpaOnPods:
    """Return an HPA on the mean use of the KV cache."""
    return HpaOnPods(lambda replica: replica.kv_ratio, target, name="hpa-kv")
