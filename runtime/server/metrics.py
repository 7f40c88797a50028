"""Prometheus metrics under vLLM's names and bucket edges, so that what reads those reads ours.

Counters and gauges the engine keeps itself are read when scraped; only timings are recorded.
Every label set exists from the start: a missing series looks like an outage to an autoscaler.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mizzen.runtime.engine.api import EngineApi, EngineStats, FinishedRequest
from mizzen.runtime.server.errors import ApiError

# vllm/v1/metrics/buckets.py
_LATENCY_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_ITL_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

_FINISHED = ("stop", "length", "abort")
_REJECTED = ("busy", "draining", "context_length_exceeded", "engine_dead", "not_ready", "other")
_LABELS = ("model_name", "engine")


class Observed(Protocol):
    """What is read at each scrape; `service.Service` has it."""

    @property
    def phase(self) -> str:
        """Where the process is between its start and its end."""

    @property
    def engine_or_none(self) -> EngineApi | None:
        """The engine, or None while the model loads."""

    @property
    def is_draining(self) -> bool:
        """Whether a stop has begun."""

    def is_ready(self) -> bool:
        """Whether this replica should get new requests."""


class Metrics:
    """The engine's `Recorder`, and the registry that /metrics prints."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name, "0")
        self._ttft = self._histogram("time_to_first_token_seconds", _TTFT_S)
        self._itl = self._histogram("inter_token_latency_seconds", _ITL_S)
        self._per_token = self._histogram("request_time_per_output_token_seconds", _ITL_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", _LATENCY_S)
        self._queue = self._histogram("request_queue_time_seconds", _LATENCY_S)
        self._inference = self._histogram("request_inference_time_seconds", _LATENCY_S)
        self._prefill = self._histogram("request_prefill_time_seconds", _LATENCY_S)
        self._decode = self._histogram("request_decode_time_seconds", _LATENCY_S)
        self._step_tokens = self._histogram("iteration_tokens_total", _STEP_TOKENS)
        self._step_seconds = self._histogram("engine_step_seconds", _STEP_S, prefix="mizzen")
        self._request_tokens: tuple[Histogram, Histogram] | None = None
        self._finished = self._counters("request_success", "finished_reason", _FINISHED)
        self._rejected = self._counters("admission_rejections", "reason", _REJECTED)

    def observe(self, observed: Observed) -> None:
        """Read `observed` at each scrape."""
        self.registry.register(_Scrape(observed, self._labels))

    def on_loaded(self, model_len: int) -> None:
        """Create what needs the context length: vLLM's token buckets end there."""
        buckets = tuple(_one_two_five(model_len))
        self._request_tokens = (
            self._histogram("request_prompt_tokens", buckets),
            self._histogram("request_generation_tokens", buckets),
        )

    def on_first_token(self, ttft_s: float) -> None:
        """Take a request's time to its first token."""
        self._ttft.observe(ttft_s)

    def on_token(self, itl_s: float) -> None:
        """Take the time between two tokens."""
        self._itl.observe(itl_s)

    def on_step(self, step_s: float, tokens: int) -> None:
        """Take a step's time and size."""
        self._step_seconds.observe(step_s)
        self._step_tokens.observe(tokens)

    def on_finish(self, finished: FinishedRequest) -> None:
        """Take a request's life."""
        self._finished[finished.finish_reason].inc()
        self._e2e.observe(finished.e2e_s)
        self._queue.observe(finished.queue_s)
        self._prefill.observe(finished.prefill_s)
        self._decode.observe(finished.decode_s)
        self._inference.observe(finished.prefill_s + finished.decode_s)
        if finished.output_tokens > 1:
            self._per_token.observe(finished.decode_s / (finished.output_tokens - 1))
        if self._request_tokens:
            prompt, generation = self._request_tokens
            prompt.observe(finished.prompt_tokens)
            generation.observe(finished.output_tokens)

    def reject(self, error: ApiError) -> None:
        """Count a request that was not served."""
        code = error.code if error.code in self._rejected else "other"
        self._rejected[code or "other"].inc()

    def _histogram(
        self, name: str, buckets: tuple[float, ...], *, prefix: str = "vllm"
    ) -> Histogram:
        family = Histogram(
            f"{prefix}:{name}", _help(name), _LABELS, buckets=buckets, registry=self.registry
        )
        return family.labels(*self._labels)

    def _counters(self, name: str, label: str, values: Iterable[str]) -> dict[str, Counter]:
        family = Counter(f"vllm:{name}", _help(name), (*_LABELS, label), registry=self.registry)
        return {value: family.labels(*self._labels, value) for value in values}


class _Scrape(Collector):
    """Turns the engine's figures of now into metric families."""

    def __init__(self, observed: Observed, labels: tuple[str, str]) -> None:
        self._observed = observed
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        yield self._phase()
        yield self._gauge("mizzen:draining", float(self._observed.is_draining))
        yield self._gauge("mizzen:ready", float(self._observed.is_ready()))
        engine = self._observed.engine_or_none
        stats = engine.stats() if engine else _NOTHING_YET
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield self._waiting_by_reason(stats)
        yield self._cache_config(stats)
        yield self._loras(stats)
        yield self._start_phases(stats)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._gauge("vllm:num_requests_running", stats.running)
        yield self._gauge("vllm:num_requests_waiting", stats.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", stats.kv_usage_ratio)
        yield self._gauge("mizzen:kv_blocks_free", stats.blocks_free)
        yield self._gauge("mizzen:engine_heartbeat_age_seconds", stats.heartbeat_age_s)
        yield self._gauge("mizzen:loans_running", float(stats.loan_step is not None))
        if stats.loan_step is not None:
            yield self._gauge("mizzen:loan_step", stats.loan_step)

    def _counters(self, stats: EngineStats) -> Iterator[Metric]:
        yield self._counter("vllm:prompt_tokens", stats.prompt_tokens)
        yield self._counter("vllm:generation_tokens", stats.generation_tokens)
        yield self._counter("vllm:num_preemptions", stats.preemptions)
        yield self._counter("vllm:prefix_cache_queries", stats.prefix_queries)
        yield self._counter("vllm:prefix_cache_hits", stats.prefix_hits)
        yield self._counter("vllm:spec_decode_num_draft_tokens", stats.draft_tokens)
        yield self._counter("vllm:spec_decode_num_accepted_tokens", stats.accepted_tokens)
        yield self._counter("mizzen:engine_steps", stats.steps)

    def _gauge(self, name: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, _help(name), labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, value: float) -> Metric:
        family = CounterMetricFamily(name, _help(name), labels=_LABELS)
        family.add_metric(self._labels, value)
        return family

    def _labelled(self, name: str, labels: dict[str, str], value: float = 1.0) -> Metric:
        family = GaugeMetricFamily(name, _help(name), labels=(*_LABELS, *labels))
        family.add_metric((*self._labels, *labels.values()), value)
        return family

    def _waiting_by_reason(self, stats: EngineStats) -> Metric:
        return self._labelled(
            "vllm:num_requests_waiting_by_reason", {"reason": "capacity"}, stats.waiting
        )

    def _cache_config(self, stats: EngineStats) -> Metric:
        return self._labelled(
            "vllm:cache_config_info",
            {
                "block_size": str(stats.block_size),
                "num_gpu_blocks": str(stats.blocks_total),
            },
        )

    def _loras(self, stats: EngineStats) -> Metric:
        # Always there, even with no adapter: pickers take a missing series for a broken server.
        return self._labelled(
            "vllm:lora_requests_info",
            {
                "max_lora": str(stats.max_loras),
                "running_lora_adapters": ",".join(stats.running_adapters),
                "waiting_lora_adapters": ",".join(stats.waiting_adapters),
            },
            value=time.time(),  # readers take the series with the latest value
        )

    def _start_phases(self, stats: EngineStats) -> Metric:
        name = "mizzen:startup_phase_seconds"
        family = GaugeMetricFamily(name, _help(name), labels=(*_LABELS, "phase"))
        for phase, seconds in stats.start_seconds.items():
            family.add_metric((*self._labels, phase), seconds)
        return family

    def _phase(self) -> Metric:
        return self._labelled("mizzen:phase", {"phase": str(self._observed.phase)})


_NOTHING_YET = EngineStats(
    running=0,
    waiting=0,
    blocks_total=0,
    blocks_free=0,
    kv_usage_ratio=0.0,
    prompt_tokens=0,
    generation_tokens=0,
    preemptions=0,
    prefix_queries=0,
    prefix_hits=0,
    steps=0,
    heartbeat_age_s=0.0,
)


def _one_two_five(largest: int) -> Iterator[float]:
    scale = 1
    while scale <= largest:
        yield from (float(step * scale) for step in (1, 2, 5) if step * scale <= largest)
        scale *= 10


def _help(name: str) -> str:
    return name.rpartition(":")[2].replace("_", " ").capitalize() + "."
