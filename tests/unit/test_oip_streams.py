"""Streams of the Open Inference Protocol, as the official clients read them over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from mizzen.runtime.server import oip_grpc
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, eventually, running_server
from tests.fixtures.triton_tensors import tensors

# One server for all tests here; each begins with the engine as new.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("fake")]
ENGINE = FakeEngine()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[Running]:
    async with running_server(ENGINE) as running:
        yield running


@pytest.fixture
def fake() -> FakeEngine:
    ENGINE.reset()
    return ENGINE


def text(result: Any, name: str = "text_output") -> str:
    return result.as_numpy(name)[0].decode()


async def stream(running: Running, *requests: dict[str, Any]) -> list[Any]:
    """Send the requests on one gRPC stream and return its results."""

    async def given() -> AsyncIterator[dict[str, Any]]:
        for number, values in enumerate(requests):
            yield {
                "model_name": "tiny",
                "inputs": tensors(tritonclient.grpc.aio, **values),
                "request_id": str(number),
                "enable_empty_final_response": True,
            }

    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        return [found async for found in client.stream_infer(given())]


def is_final(result: Any) -> bool:
    return result.get_response().parameters["triton_final_response"].bool_param


async def test_a_stream_brings_pieces_and_marks_the_last(running: Running) -> None:
    results = await stream(running, {"text_input": b"x", "stream": True})
    assert all(error is None for _, error in results)
    pieces = [text(result) for result, _ in results]
    assert "".join(pieces) == "Hello world"
    assert len(pieces) == 11
    assert [is_final(result) for result, _ in results] == [False] * 10 + [True]
    counts = [int(result.as_numpy("num_output_tokens")[0]) for result, _ in results]
    assert sum(counts) == 11


async def test_a_stream_answers_several_requests_each_under_its_id(running: Running) -> None:
    results = await stream(
        running,
        {"text_input": b"a", "stream": True},
        {"text_input": b"b"},
        {"text_input": b"x" * 200, "stream": True},
    )
    by_id: dict[str, list[Any]] = {"0": [], "1": []}
    errors = [error for _, error in results if error is not None]
    for result, error in results:
        if error is None:
            by_id[result.get_response().id].append(result)
    assert "".join(text(result) for result in by_id["0"]) == "Hello world"
    assert [text(result) for result in by_id["1"]] == ["bHello world"]
    assert is_final(by_id["1"][0])
    assert len(errors) == 1
    assert "context holds 128" in str(errors[0])


async def test_a_stream_that_is_never_read_holds_so_many_requests_and_no_more(
    running: Running, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oip_grpc, "_MOST_OPEN", 3)
    monkeypatch.setattr(oip_grpc, "_MOST_UNREAD", 2)
    fake.stall_after = 1
    requests = [{"text_input": "x", "stream": True}] * 20
    asked = asyncio.ensure_future(stream(running, *requests))
    await eventually(lambda: len(fake.requests) == 3)
    await asyncio.sleep(0.2)  # for those that must not come
    assert len(fake.requests) == 3
    fake.release.set()
    results = await asyncio.wait_for(asked, 60)
    assert sum(is_final(result) for result, _ in results) == len(fake.requests) == 20


async def test_the_sync_client_streams_with_a_callback(running: Running) -> None:
    got: list[Any] = []

    def session() -> None:
        with tritonclient.grpc.InferenceServerClient(running.grpc_address) as client:
            client.start_stream(callback=lambda result, error: got.append((result, error)))
            client.async_stream_infer(
                "tiny", tensors(tritonclient.grpc, text_input=b"x", stream=True)
            )
            client.stop_stream()

    await asyncio.to_thread(session)
    assert "".join(text(result) for result, _ in got) == "Hello world"
    assert is_final(got[-1][0])
