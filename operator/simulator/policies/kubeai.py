"""KubeAI's model autoscaler: a ten-minute mean of the proxy's active requests."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mizzen.operator.simulator.signals import View


@dataclass(slots=True)
class KubeAi:
    """ceil(mean active requests / targetRequests); down after so many downs in a row.

    The mean is over the samples there are, which is kinder than the source: after a restart
    without remembered state it begins from zeros. Without any sample the size stays.

    Source: kubeai-project/kubeai: internal/modelautoscaler/autoscaler.go and
    internal/modelclient/scale.go; defaults from charts/kubeai/values.yaml (interval 10 s,
    timeWindow 10 m) and the Model resource (targetRequests 100, scaleDownDelaySeconds 30).
    """

    target: float = 100.0
    down_delay_s: float = 30.0
    name: str = "kubeai"
    interval_s: float = 10.0
    scrape_s: float = 10.0
    window_s: float = 600.0
    _downs_in_a_row: int = 0

    def wanted(self, view: View) -> int:
        """Return the size after this interval."""
        samples = view.within(self.window_s)
        if not samples:
            return view.current
        active = sum(sample.in_flight for sample in samples) / len(samples)
        wish = ceil(active / self.target)
        if wish >= view.current:
            self._downs_in_a_row = 0
            return wish
        if self._downs_in_a_row < ceil(self.down_delay_s / self.interval_s):
            self._downs_in_a_row += 1
            return view.current
        self._downs_in_a_row = 0
        return wish
