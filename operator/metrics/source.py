"""Where the autoscaler's figures come from: one interface, two sources behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mizzen.operator.metrics.figures import Measured, Name, Target


class MetricsSource(Protocol):
    """Figures of many deployments at once; what cannot be had is unknown, never an exception."""

    async def collect(self, targets: Sequence[Target]) -> Mapping[Name, Measured]:
        """Return the signals of each target."""

    async def close(self) -> None:
        """Close the connections."""
