"""Spans of the gateway and the real runtime behind it, as a collector gets them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from mizzen.runtime.engine.errors import EngineBusyError, EngineDeadError
from mizzen.runtime.tracing import NO_TRACING, start_tracing
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.gateway_house import CHAT, House, open_houses
from tests.fixtures.otlp_receiver import Receiver, Seen, receiving
from tests.fixtures.runtime_server import Running, eventually, running_server, running_tiny_model
from tests.fixtures.triton_tensors import tensors

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 4,
    "ignore_eos": True,
}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        yield receiver


@asynccontextmanager
async def both(engine: Any, **settings: Any) -> AsyncIterator[tuple[House, Running]]:
    async with running_server(engine, served_model_name="tiny") as running, open_houses() as make:
        house = await make(upstream=[f"tiny={running.url}"], **settings)
        yield house, running


async def ask(house: House, body: dict[str, Any], **headers: str) -> tuple[int, str]:
    async with house.client.post(house.url + CHAT, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


def pair(receiver: Receiver) -> tuple[Seen, Seen]:
    """Return the gateway's span and the runtime's, which is part of it."""
    (front,), (back,) = receiver.of("mizzen-gateway"), receiver.of("mizzen-runtime")
    assert back.trace_id == front.trace_id
    assert back.parent_id == front.span_id
    return front, back


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_is_one_trace_from_the_client_s_to_the_engine_s_times(
    receiver: Receiver, tmp_path: Path, stream: bool
) -> None:
    async with running_tiny_model(tmp_path) as running, open_houses() as make:
        house = await make(upstream=[f"tiny={running.url}"])
        status, _ = await ask(house, BODY | {"stream": stream}, traceparent=TRACEPARENT)
        assert status == 200
    front, back = pair(receiver)
    assert (front.trace_id, front.parent_id) == (TRACE, PARENT)
    assert front.name == back.name == "chat tiny"
    assert not front.is_error
    assert not back.is_error
    assert front.attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert front.attributes["server.address"] == running.url
    shared = {
        "gen_ai.provider.name": "mizzen",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "http.response.status_code": 200,
    }
    own = {
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert shared.items() <= front.attributes.items()
    assert (shared | own).items() <= back.attributes.items()
    assert back.attributes["gen_ai.usage.input_tokens"] > 1
    latency = {
        name: back.attributes[f"gen_ai.latency.{name}"]
        for name in ("time_in_queue", "time_in_model_prefill", "time_in_model_decode", "e2e")
    }
    assert all(seconds >= 0 for seconds in latency.values())
    assert latency["time_in_model_prefill"] > 0
    assert latency["time_in_model_decode"] > 0
    ttft = latency["time_in_queue"] + latency["time_in_model_prefill"]
    assert back.attributes["gen_ai.latency.time_to_first_token"] == pytest.approx(ttft)


async def test_several_answers_count_their_prompt_once(receiver: Receiver, tmp_path: Path) -> None:
    async with running_tiny_model(tmp_path) as running:
        one = (await running.http.post(CHAT, json=BODY | {"n": 3})).json()["usage"]
    (span,) = receiver.of("mizzen-runtime")
    assert span.attributes["gen_ai.usage.input_tokens"] == one["prompt_tokens"]
    assert span.attributes["gen_ai.usage.output_tokens"] == 12
    assert span.attributes["gen_ai.response.finish_reasons"] == ["length"] * 3


async def test_a_trace_begins_at_the_gateway_where_the_client_has_none(receiver: Receiver) -> None:
    async with both(FakeEngine()) as (house, _):
        await ask(house, BODY)
        await ask(house, BODY, traceparent="of no such form")
    fronts = receiver.of("mizzen-gateway")
    assert len({span.trace_id for span in fronts}) == 2
    assert not any(span.parent_id for span in fronts)
    assert {span.parent_id for span in receiver.of("mizzen-runtime")} == {
        span.span_id for span in fronts
    }


async def test_a_client_that_is_not_sampled_is_answered_and_not_traced(
    receiver: Receiver, tmp_path: Path
) -> None:
    async with running_tiny_model(tmp_path) as running, open_houses() as make:
        house = await make(upstream=[f"tiny={running.url}"])
        unsampled = TRACEPARENT[:-2] + "00"
        assert (await ask(house, BODY, traceparent=unsampled))[0] == 200
        assert (await ask(house, BODY | {"n": 0}, traceparent=unsampled))[0] == 400
    assert not receiver.spans


FAILURES: dict[str, tuple[FakeEngine, dict[str, Any], int, str, bool]] = {
    "a wrong field": (FakeEngine(), {"n": 0}, 400, "400", False),
    "a full queue": (
        FakeEngine(refuse=EngineBusyError("The queue is full.", retry_after_s=1)),
        *({}, 429, "busy", False),
    ),
    "a bug": (FakeEngine(fail_after=0, fail_with=KeyError("x")), {}, 500, "internal_error", True),
}


@pytest.mark.parametrize(
    ("engine", "fields", "status", "kind", "is_error"), FAILURES.values(), ids=FAILURES
)
async def test_a_refused_request_says_why_on_both_sides(
    receiver: Receiver,
    engine: FakeEngine,
    fields: dict[str, Any],
    status: int,
    kind: str,
    is_error: bool,
) -> None:
    async with both(engine) as (house, _):
        assert (await ask(house, BODY | fields))[0] == status
    front, back = pair(receiver)
    assert front.attributes["http.response.status_code"] == status
    assert back.attributes["http.response.status_code"] == status
    assert (front.attributes["error.type"], front.is_error) == (str(status), is_error)
    assert (back.attributes["error.type"], back.is_error) == (kind, is_error)


async def test_a_stream_that_breaks_is_a_failure_though_its_status_was_200(
    receiver: Receiver,
) -> None:
    engine = FakeEngine(fail_after=3, fail_with=EngineDeadError("The loop has stopped."))
    async with both(engine) as (house, _):
        status, text = await ask(house, BODY | {"stream": True, "max_tokens": 9})
        assert (status, "engine_dead" in text) == (200, True)
    back = receiver.of("mizzen-runtime")[0]
    assert back.attributes["http.response.status_code"] == 200
    assert (back.attributes["error.type"], back.is_error) == ("engine_dead", True)


async def test_what_the_gateway_refuses_itself_is_traced_too(receiver: Receiver) -> None:
    async with both(FakeEngine()) as (house, _):
        assert (await ask(house, BODY | {"model": "nobody"}))[0] == 404
    (span,) = receiver.spans
    assert (span.service, span.name) == ("mizzen-gateway", "chat nobody")
    assert span.attributes["http.response.status_code"] == 404


async def test_a_client_that_goes_is_no_failure_of_the_server(receiver: Receiver) -> None:
    engine = FakeEngine(stall_after=1)
    async with both(engine) as (house, running):
        call = asyncio.create_task(ask(house, BODY))
        await eventually(lambda: running.service.in_flight() == 1)
        call.cancel()
        await eventually(lambda: running.service.in_flight() == 0)
    for span in pair(receiver):
        assert (span.attributes["error.type"], span.is_error) == ("client_gone", False)


async def test_both_ways_of_the_inference_protocol_are_traced(receiver: Receiver) -> None:
    inputs = tensors(tritonclient.grpc.aio, text_input=b"x", stream=False)
    headers = {"traceparent": TRACEPARENT}
    async with running_server(FakeEngine()) as running:
        async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
            await client.infer("tiny", inputs, headers=headers)
            with pytest.raises(InferenceServerException):
                await client.infer("nobody", inputs, headers=headers)
        given = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}
        await running.http.post("/v2/models/tiny/infer", json={"inputs": [given]}, headers=headers)
    assert {(span.trace_id, span.parent_id) for span in receiver.spans} == {(TRACE, PARENT)}
    told = [(span.name, span.attributes["http.response.status_code"]) for span in receiver.spans]
    assert told == [
        ("text_completion tiny", 200),
        ("text_completion nobody", 404),
        ("text_completion tiny", 200),
    ]


async def test_without_a_collector_the_client_s_trace_is_passed_on_as_it_came() -> None:
    async with open_houses() as make_house:
        house = await make_house([])
        await ask(house, BODY, traceparent=TRACEPARENT)
        assert house.replicas[0].seen[0].headers["traceparent"] == TRACEPARENT


async def test_a_collector_that_is_gone_fails_no_request_and_holds_up_no_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    async with both(FakeEngine()) as (house, _):
        assert (await ask(house, BODY))[0] == 200


def test_without_a_collector_nothing_of_opentelemetry_is_imported() -> None:
    assert start_tracing("any") is NO_TRACING
    program = (
        "import sys, mizzen.runtime.server.main, mizzen.runtime.gateway.server as g\n"
        "from mizzen.runtime.gateway.config import GatewayConfig\n"
        "g.Gateway(GatewayConfig(upstream=['a=http://127.0.0.1:1'], auth='off'))\n"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_missing_package_is_told_and_leaves_requests_untraced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "mizzen.runtime.otlp", None)
    assert start_tracing("any") is NO_TRACING
    assert "extra 'tracing'" in caplog.text
