"""Knative's pod autoscaler (KPA) on concurrency, with its stable and panic windows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from math import ceil, floor

from mizzen.operator.simulator.signals import Sample, View

_MAX_UP_RATE = 1000.0
_MAX_DOWN_RATE = 2.0


@dataclass(slots=True)
class KnativeKpa:
    """ceil(mean concurrency / target) over 60 s, or over 6 s while panicking, never shrinking then.

    `target` is the autoscaler's TargetValue: the container's concurrency times 70 % by default.
    Requests held for want of a replica count, as they do in the activator. Without data in the
    window there is no valid scale and the size stays.

    Source: knative/serving: pkg/autoscaler/scaling/autoscaler.go, `Scale`; its defaults:
    config/core/configmaps/autoscaler.yaml.
    """

    target: float = 18.0
    down_delay_s: float = 0.0
    panic_ratio: float = 2.0
    stable_s: float = 60.0
    panic_s: float = 6.0
    name: str = "knative-kpa"
    interval_s: float = 2.0
    scrape_s: float = 1.0
    window_s: float = 62.0
    _panicking_since: float | None = None
    _most_in_panic: int = 0
    _wishes: deque[tuple[float, int]] = field(default_factory=deque)

    def wanted(self, view: View) -> int:
        """Return the size after this tick."""
        stable = mean_concurrency(view.within(self.stable_s))
        panic = mean_concurrency(view.within(self.panic_s + self.scrape_s))
        if stable is None:
            return view.current
        ready = max(1, view.ready)
        # Without a sample in the short window its mean is zero in the source's ring buffer.
        wish = self._wish(stable, panic or 0.0, ready=ready, now=view.now)
        return self._delayed(wish, now=view.now)

    def _wish(self, stable: float, panic: float, *, ready: int, now: float) -> int:
        lowest, highest = floor(ready / _MAX_DOWN_RATE), ceil(ready * _MAX_UP_RATE)
        stable_pods = ceil(stable / self.target)
        panic_pods = ceil(panic / self.target)
        self._update_panic(panic_pods / ready >= self.panic_ratio, now)
        wish = min(max(stable_pods, lowest), highest)
        if self._panicking_since is None:
            return wish
        wish = max(wish, min(max(panic_pods, lowest), highest))
        self._most_in_panic = max(self._most_in_panic, wish)
        return self._most_in_panic

    def _update_panic(self, is_over: bool, now: float) -> None:
        if is_over:
            self._panicking_since = now
        elif self._panicking_since is not None and self._panicking_since + self.stable_s < now:
            self._panicking_since = None
            self._most_in_panic = 0

    def _delayed(self, wish: int, *, now: float) -> int:
        if not self.down_delay_s:
            return wish
        self._wishes.append((now, wish))
        while self._wishes[0][0] <= now - self.down_delay_s:
            self._wishes.popleft()
        return max(wish for _, wish in self._wishes)


def mean_concurrency(samples: list[Sample]) -> float | None:
    """Return the mean number of requests in flight between the first and last sample."""
    if len(samples) < 2:
        return None
    first, last = samples[0], samples[-1]
    return (last.in_flight_s_total - first.in_flight_s_total) / (last.at - first.at)
