"""A fixed number of replicas: the peer that every autoscaler must beat."""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.simulator.signals import View


@dataclass(slots=True)
class Fixed:
    """Always the same number. The best one in hindsight is found by trying them all."""

    replicas: int = 1
    name: str = "static"
    interval_s: float = 60.0
    scrape_s: float = 60.0
    window_s: float = 60.0

    def wanted(self, view: View) -> int:
        """Return the fixed number."""
        return self.replicas
