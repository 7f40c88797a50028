"""A canary's share of the requests: who takes which, and how each revision fares.

Every gateway counts for itself. Of any hundred requests in a row through one of them exactly as
many as the weight says go to the canary, evenly spread.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.registry import Collector

from mizzen.runtime.gateway.directory import Directory, Endpoint, ObjectKey, ServedModel
from mizzen.runtime.gateway.tally import Family, Tally, families


class CanaryTurns:
    """Whose turn it is, by deployment."""

    def __init__(self) -> None:
        self._owed: dict[ObjectKey, int] = {}

    def take(self, model: ServedModel) -> bool:
        """Return whether the next request is the canary's."""
        if model.canary is None:
            self._owed.pop(model.key, None)
            return False
        owed = self._owed.get(model.key, 0) + model.canary.weight
        self._owed[model.key] = owed % 100
        return owed >= 100

    def forget(self, key: ObjectKey) -> None:
        """Drop what is known of a model that is gone."""
        self._owed.pop(key, None)


def sides(
    endpoints: tuple[Endpoint, ...], model: ServedModel
) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """Return the canary's replicas and the others."""
    own = tuple(e for e in endpoints if model.is_canary(e))
    return own, tuple(e for e in endpoints if e not in own)


class CanaryCounts(Collector):
    """How both revisions fare; there are no series while there is no canary."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        # By deployment: the canary that is counted, and the counts by revision.
        self._counts: dict[ObjectKey, tuple[str, dict[str, Tally]]] = {}

    def on_request(self, model: ServedModel, endpoint: Endpoint) -> None:
        """A replica took a request, or should have."""
        if (counts := self._of(model, endpoint)) is not None:
            counts.requests += 1

    def on_failure(self, model: ServedModel, endpoint: Endpoint) -> None:
        """The request failed by the replica's fault, at once or in the middle of its answer."""
        if (counts := self._of(model, endpoint)) is not None:
            counts.failures += 1

    def on_first_byte(self, model: ServedModel, endpoint: Endpoint, seconds: float) -> None:
        """Its answer began so long after it was sent."""
        if (counts := self._of(model, endpoint)) is not None:
            counts.add_first_byte(seconds)

    def _of(self, model: ServedModel, endpoint: Endpoint) -> Tally | None:
        canary = model.canary
        if canary is None:
            return None
        counted, by_revision = self._counts.get(model.key, ("", {}))
        if counted != canary.revision:
            by_revision = {}
            self._counts[model.key] = (canary.revision, by_revision)
        revision = canary.revision if model.is_canary(endpoint) else canary.stable
        return by_revision.setdefault(revision, Tally())

    def collect(self) -> Iterator[Family]:
        """Yield the series of the canaries that there are now."""
        labels = ("namespace", "model", "revision")
        yield from families("mizzen_gateway_canary", "a canary began", labels, self._rows())

    def _rows(self) -> Iterator[tuple[tuple[str, ...], Tally]]:
        for key in list(self._counts):
            model = self._directory.model(key)
            counted, by_revision = self._counts[key]
            if model is None or model.canary is None or model.canary.revision != counted:
                del self._counts[key]
                continue
            for revision, tally in by_revision.items():
                yield (*key, revision), tally
