"""Metrics under vLLM's names: complete from the first scrape, right in their counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mizzen.runtime.engine.api import FinishedRequest
from mizzen.runtime.engine.errors import EngineBusyError
from mizzen.runtime.server.errors import ApiError, to_api_error
from mizzen.runtime.server.metrics import Metrics
from tests.fixtures.fake_engine import FakeEngine

# What the Gateway API's model-server protocol, our own scaler and vLLM's dashboards read.
SERIES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:admission_rejections_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_inference_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
    "vllm:iteration_tokens_total_count",
}


@dataclass
class Observed:
    """What the scrape reads."""

    phase: str = "loading-model"
    engine_or_none: Any = None
    is_draining: bool = False

    def is_ready(self) -> bool:
        return False


@pytest.fixture
def metrics() -> Metrics:
    made = Metrics("tiny")
    made.observe(Observed())
    return made


def samples(metrics: Metrics) -> Iterator[Any]:
    text = generate_latest(metrics.registry).decode()
    for family in text_string_to_metric_families(text):
        yield from family.samples


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [
        sample.value
        for sample in samples(metrics)
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def test_every_series_is_there_before_the_model_is(metrics: Metrics) -> None:
    names = {sample.name for sample in samples(metrics)}
    assert names >= SERIES
    reasons = {
        sample.labels["finished_reason"]
        for sample in samples(metrics)
        if sample.name == "vllm:request_success_total"
    }
    assert reasons == {"stop", "length", "abort"}


def test_every_series_names_its_model_and_engine(metrics: Metrics) -> None:
    assert all(
        sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0"
        for sample in samples(metrics)
    )


def test_no_adapter_is_told_by_an_empty_list_not_by_silence() -> None:
    metrics = Metrics("tiny")
    metrics.observe(Observed(engine_or_none=FakeEngine()))
    labels = {"running_lora_adapters": "", "waiting_lora_adapters": "", "max_lora": "0"}
    assert value(metrics, "vllm:lora_requests_info", **labels) > 0


def test_a_finished_request_counts_in_each_histogram_once(metrics: Metrics) -> None:
    metrics.on_loaded(model_len=300)
    metrics.on_finish(
        FinishedRequest(
            finish_reason="length",
            prompt_tokens=30,
            cached_tokens=0,
            output_tokens=11,
            e2e_s=4.0,
            queue_s=1.0,
            prefill_s=1.0,
            decode_s=2.0,
        )
    )
    assert value(metrics, "vllm:request_success_total", finished_reason="length") == 1
    assert value(metrics, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum") == 4.0
    assert value(metrics, "vllm:request_inference_time_seconds_sum") == 3.0
    assert value(metrics, "vllm:request_time_per_output_token_seconds_sum") == 0.2
    assert value(metrics, "vllm:request_prompt_tokens_sum") == 30
    assert value(metrics, "vllm:request_generation_tokens_bucket", le="10.0") == 0
    assert value(metrics, "vllm:request_generation_tokens_bucket", le="20.0") == 1
    edges = {
        sample.labels["le"]
        for sample in samples(metrics)
        if sample.name == "vllm:request_prompt_tokens_bucket"
    }
    assert edges == {"1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "+Inf"}


def test_one_token_has_no_time_per_output_token(metrics: Metrics) -> None:
    metrics.on_finish(
        FinishedRequest(
            finish_reason="stop",
            prompt_tokens=3,
            cached_tokens=0,
            output_tokens=1,
            e2e_s=1.0,
            queue_s=0.0,
            prefill_s=1.0,
            decode_s=0.0,
        )
    )
    assert value(metrics, "vllm:request_time_per_output_token_seconds_count") == 0


def test_each_phase_of_the_start_is_told() -> None:
    metrics = Metrics("tiny")
    metrics.observe(Observed(engine_or_none=FakeEngine()))
    assert value(metrics, "mizzen:startup_phase_seconds", phase="weights") == 1.5


def test_rejections_count_by_reason(metrics: Metrics) -> None:
    metrics.reject(to_api_error(EngineBusyError("full", retry_after_s=1)))
    metrics.reject(ApiError(400, "odd", code="never_heard_of"))
    assert value(metrics, "vllm:admission_rejections_total", reason="busy") == 1
    assert value(metrics, "vllm:admission_rejections_total", reason="other") == 1
    assert value(metrics, "vllm:admission_rejections_total", reason="draining") == 0
