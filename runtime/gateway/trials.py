"""How an adapter on trial fares, beside all else that its deployment was asked meanwhile.

An adapter shares its replicas with the base model and with other adapters: what is wrong with a
replica shows in all of them, what is wrong with the adapter in its own requests alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.registry import Collector

from mizzen.runtime.gateway.directory import Directory, ObjectKey, Route
from mizzen.runtime.gateway.tally import Family, Tally, families

# An adapter's name and the digest of its content: a name moves from one version to the next.
Trial = tuple[str, str]


@dataclass(slots=True)
class _Sides:
    """Of one trial, since it began."""

    own: Tally = field(default_factory=Tally)
    others: Tally = field(default_factory=Tally)


class TrialCounts(Collector):
    """How adapters on trial fare; there are no series while none is."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._counts: dict[ObjectKey, dict[Trial, _Sides]] = {}

    def on_request(self, route: Route) -> None:
        """A replica took a request, or should have."""
        for tally in self._of(route):
            tally.requests += 1

    def on_failure(self, route: Route) -> None:
        """The request failed by the replica's fault, at once or in the middle of its answer."""
        for tally in self._of(route):
            tally.failures += 1

    def on_first_byte(self, route: Route, seconds: float) -> None:
        """Its answer began so long after it was sent."""
        for tally in self._of(route):
            tally.add_first_byte(seconds)

    def _of(self, route: Route) -> Iterator[Tally]:
        """Yield the side of each trial that the request belongs to."""
        if not route.model.trials:
            return
        counts = self._counts.setdefault(route.model.key, {})
        for trial in route.model.trials:
            sides = counts.setdefault(trial, _Sides())
            yield sides.own if route.adapter == trial[0] else sides.others

    def collect(self) -> Iterator[Family]:
        """Yield the series of the trials that there are now."""
        yield from families(
            "mizzen_gateway_trial",
            "an adapter's trial began: its own, and all others of its deployment",
            ("namespace", "model", "adapter", "digest", "side"),
            self._rows(),
        )

    def _rows(self) -> Iterator[tuple[tuple[str, ...], Tally]]:
        for key in list(self._counts):
            model = self._directory.model(key)
            on_trial = () if model is None else model.trials
            counts = {t: sides for t, sides in self._counts[key].items() if t in on_trial}
            self._counts[key] = counts
            if not counts:
                del self._counts[key]
            for trial, sides in counts.items():
                yield (*key, *trial, "own"), sides.own
                yield (*key, *trial, "others"), sides.others
