"""A leg of the live benchmark of lending, and what all of them say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, stdev

from benchmarks.lent_time import Lease, useful_pct
from benchmarks.open_loop import Answer, Limits, attained_pct, in_figures
from benchmarks.rows import Row

MOST_POINTS_LOST, LEAST_USEFUL_PCT = 0.5, 85.0
FACTORS = (0.5, 0.75, 1.5, 2.0)  # of the limits


@dataclass(frozen=True, slots=True)
class Size:
    """From a moment on, so many replicas are wanted and so many serve."""

    at_s: float
    wanted: int
    serving: int


@dataclass(slots=True)
class Leg:
    """One pass of the requests, with a job or without one."""

    number: int
    lends: bool
    begun_s: float = 0.0  # when its requests began, by the clock of the sizes
    alone: list[Answer] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What its resources are called: others than those of all other legs."""
        return f"live-{self.number}-{'lent' if self.lends else 'alone'}"

    def row(self, limits: Limits) -> Row:
        """Return what a table shows of it."""
        alone = in_figures(self.alone)
        share = useful_pct(self.leases)
        yields = [round(y, 1) for lease in self.leases if (y := lease.yield_s) is not None]
        return {
            "round": self.number,
            "lending": "on" if self.lends else "off",
            "alone_ttft_ms": alone["ttft_p50_ms"],
            "alone_itl_ms": alone["itl_p95_ms"],
            **in_figures(self.answers),
            "attained_pct": round(attained_pct(self.answers, limits), 2),
            **{f"at_{f:g}x": round(attained_pct(self.answers, limits.times(f)), 2)
               for f in FACTORS},
            "rises": ", ".join(
                f"{wanted - self.begun_s:.0f} to {serving - self.begun_s:.0f} s"
                for wanted, serving in rises(self.sizes)
            ),
            "yield_s": ", ".join(map(str, yields)),
            "lent_s": round(sum(lease.lent_s for lease in self.leases), 1),
            "useful_s": round(sum(lease.useful_s for lease in self.leases), 1),
            "useful_pct": None if share is None else round(share, 1),
        }  # fmt: skip


def rises(sizes: Sequence[Size]) -> list[tuple[float, float]]:
    """Return when more replicas were wanted, and when so many served; infinite where never."""
    found = []
    for index, (before, now) in enumerate(pairwise(sizes), start=1):
        if now.wanted > before.wanted:
            served = (s.at_s for s in sizes[index:] if s.serving >= now.wanted)
            found.append((now.at_s, next(served, float("inf"))))
    return found


def summary(legs: Sequence[Leg], limits: Limits) -> list[str]:
    """Return what lending cost and brought, over all rounds."""
    alone = [leg for leg in legs if not leg.lends]
    lent = [leg for leg in legs if leg.lends]
    lines = []
    for factor in (1.0, *FACTORS):
        scaled = limits.times(factor)
        points = [
            attained_pct(on.answers, scaled) - attained_pct(off.answers, scaled)
            for off, on in zip(alone, lent, strict=True)
        ]
        spread = f"{min(points):+.2f} to {max(points):+.2f}"
        if len(points) > 1:
            spread += f", standard error {stdev(points) / len(points) ** 0.5:.2f}"
        lines.append(
            f"within {1e3 * scaled.ttft_s:.0f} and {1e3 * scaled.itl_s:.0f} ms: "
            f"{mean(points):+.2f} points by lending ({spread})"
        )
    lines[0] += f"; at least {-MOST_POINTS_LOST}"
    share = useful_pct(lease for leg in lent for lease in leg.leases)
    told = "nothing was lent" if share is None else f"{share:.1f} %"
    return [*lines, f"of the lent time useful: {told}; at least {LEAST_USEFUL_PCT:g}"]
