"""How requests fare, counted so that two kinds of them can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

# Two are compared: edges a quarter apart tell a p90 from one a quarter longer.
_FIRST_EDGE_S, _LAST_EDGE_S, _RATIO = 0.001, 300.0, 1.25
_EDGES_S = (
    *takewhile(
        lambda edge: edge < _LAST_EDGE_S, (_FIRST_EDGE_S * _RATIO**power for power in range(100))
    ),
    float("inf"),
)


@dataclass(slots=True)
class Tally:
    """Of one kind of requests, since the comparison began."""

    requests: int = 0
    failures: int = 0
    first_bytes: list[int] = field(default_factory=lambda: [0] * len(_EDGES_S))
    seconds: float = 0.0

    def add_first_byte(self, seconds: float) -> None:
        """An answer began so long after its request was sent."""
        self.first_bytes[next(i for i, edge in enumerate(_EDGES_S) if seconds <= edge)] += 1
        self.seconds += seconds


Family = CounterMetricFamily | HistogramMetricFamily


def families(
    prefix: str, since: str, labels: Sequence[str], rows: Iterable[tuple[tuple[str, ...], Tally]]
) -> Iterator[Family]:
    """Yield the series of the tallies; `since` ends the help text of the first."""
    requests = CounterMetricFamily(f"{prefix}_requests", f"Requests since {since}.", labels=labels)
    failures = CounterMetricFamily(
        f"{prefix}_failures", "Those of them that failed by their replica's fault.", labels=labels
    )
    first_bytes = HistogramMetricFamily(
        f"{prefix}_first_byte_seconds",
        "From sending them to the first byte of the answer.",
        labels=labels,
    )
    for values, tally in rows:
        requests.add_metric(values, tally.requests)
        failures.add_metric(values, tally.failures)
        cumulative = accumulate(tally.first_bytes)
        edges = [_text(edge) for edge in _EDGES_S]
        first_bytes.add_metric(values, list(zip(edges, cumulative, strict=True)), tally.seconds)
    yield from (requests, failures, first_bytes)


def _text(edge: float) -> str:
    return "+Inf" if edge == float("inf") else f"{edge:.4g}"
