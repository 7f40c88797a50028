"""The gateway's Prometheus metrics. Labels name deployments, never what a client made up."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mizzen.runtime.gateway.canary import CanaryCounts
from mizzen.runtime.gateway.directory import Directory, Endpoint, Route, ServedModel
from mizzen.runtime.gateway.room import WaitingRoom
from mizzen.runtime.gateway.trials import TrialCounts

# From a cached error to a long prompt on a CPU.
_TTFB_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MODEL_LABELS = ("namespace", "model")


class GatewayMetrics:
    """One registry per gateway, so that tests can have several."""

    def __init__(self, directory: Directory, room: WaitingRoom) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "mizzen_gateway_requests",
            "Requests answered, by status code.",
            (*_MODEL_LABELS, "code"),
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "mizzen_gateway_in_flight_requests",
            "Requests being answered now.",
            _MODEL_LABELS,
            registry=self.registry,
        )
        self._ttfb = Histogram(
            "mizzen_gateway_time_to_first_byte_seconds",
            "From the request's arrival to the first byte of its answer.",
            _MODEL_LABELS,
            buckets=_TTFB_BUCKETS_S,
            registry=self.registry,
        )
        self._arrivals: dict[tuple[str, str], int] = {}
        self._retries = Counter(
            "mizzen_gateway_retries",
            "Requests sent on to another replica before the first byte, by reason.",
            (*_MODEL_LABELS, "reason"),
            registry=self.registry,
        )
        self._cut = Counter(
            "mizzen_gateway_cut_streams",
            "Answers that ended early because their replica was lost or failed.",
            _MODEL_LABELS,
            registry=self.registry,
        )
        self._guardrail_hits = Counter(
            "mizzen_gateway_guardrail_hits",
            "Requests refused and answers cut off by a guardrail.",
            (*_MODEL_LABELS, "guardrail"),
            registry=self.registry,
        )
        self._picks = Counter(
            "mizzen_gateway_upstream_picks",
            "Requests sent to each replica.",
            (*_MODEL_LABELS, "endpoint"),
            registry=self.registry,
        )
        self._picked: dict[str, set[tuple[str, str]]] = {}
        self.registry.register(_ByModel(directory, room))
        self.registry.register(_Arrivals(directory, self._arrivals))
        self.canary = CanaryCounts(directory)
        self.registry.register(self.canary)
        self.trials = TrialCounts(directory)
        self.registry.register(self.trials)

    def on_start(self, model: ServedModel) -> None:
        """A request for a known model begins."""
        self._arrivals[_labels(model)] = self._arrivals.get(_labels(model), 0) + 1
        self._in_flight.labels(*_labels(model)).inc()

    def on_end(self, model: ServedModel) -> None:
        """It is over, however it ended."""
        self._in_flight.labels(*_labels(model)).dec()

    def on_answer(self, model: ServedModel | None, code: int) -> None:
        """A request was answered; requests for no known model share one label."""
        self._requests.labels(*_labels(model), str(code)).inc()

    def on_first_byte(self, model: ServedModel, seconds: float) -> None:
        """The first byte of an answer went out."""
        self._ttfb.labels(*_labels(model)).observe(seconds)

    def on_retry(self, model: ServedModel, reason: str) -> None:
        """A request moves to another replica."""
        self._retries.labels(*_labels(model), reason).inc()

    def on_cut(self, model: ServedModel) -> None:
        """A replica was lost, or failed, in the middle of an answer."""
        self._cut.labels(*_labels(model)).inc()

    def on_taken(self, route: Route, endpoint: Endpoint) -> None:
        """A replica took a request, or should have: it counts for what is being compared."""
        self.trials.on_request(route)
        if not route.is_on_trial:
            self.canary.on_request(route.model, endpoint)

    def on_failed(self, route: Route, endpoint: Endpoint) -> None:
        """It failed by the replica's fault; an adapter on trial speaks for no revision."""
        self.trials.on_failure(route)
        if not route.is_on_trial:
            self.canary.on_failure(route.model, endpoint)

    def on_begun(self, route: Route, endpoint: Endpoint, seconds: float) -> None:
        """Its answer began so long after it was sent."""
        self.trials.on_first_byte(route, seconds)
        if not route.is_on_trial:
            self.canary.on_first_byte(route.model, endpoint, seconds)

    def on_guardrail(self, model: ServedModel, guardrail: str) -> None:
        """A guardrail refused a request, or cut an answer off."""
        self._guardrail_hits.labels(*_labels(model), guardrail).inc()

    def on_pick(self, model: ServedModel, url: str) -> None:
        """A replica was chosen."""
        labels = _labels(model)
        self._picked.setdefault(url, set()).add(labels)
        self._picks.labels(*labels, _endpoint(url)).inc()

    def forget_endpoint(self, url: str) -> None:
        """Drop the series of a replica that is gone: pods come and go, memory must not."""
        for labels in self._picked.pop(url, ()):
            self._picks.remove(*labels, _endpoint(url))


class _ByModel(Collector):
    def __init__(self, directory: Directory, room: WaitingRoom) -> None:
        self._directory = directory
        self._room = room

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "mizzen_gateway_endpoints_ready",
            "Replicas that may be sent requests.",
            labels=_MODEL_LABELS,
        )
        held = GaugeMetricFamily(
            "mizzen_gateway_held_requests",
            "Requests that wait for a model to start, or for room on its replicas.",
            labels=_MODEL_LABELS,
        )
        for _, model in self._directory.models():
            family.add_metric(_labels(model), self._directory.ready_count(model.key))
            held.add_metric(_labels(model), self._room.held(model.key))
        yield family
        yield held


class _Arrivals(Collector):
    """Counts requests as they come; autoscalers need the series before the first one."""

    def __init__(self, directory: Directory, counts: dict[tuple[str, str], int]) -> None:
        self._directory = directory
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "mizzen_gateway_arrivals", "Requests that arrived.", labels=_MODEL_LABELS
        )
        for _, model in self._directory.models():
            family.add_metric(_labels(model), self._counts.get(_labels(model), 0))
        yield family


def _labels(model: ServedModel | None) -> tuple[str, str]:
    return ("", "") if model is None else (model.namespace, model.deployment)


def _endpoint(url: str) -> str:
    return url.removeprefix("http://")
