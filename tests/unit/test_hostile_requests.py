"""Hostile requests to all ports of a server with the real engine, and to the gateway before it.

`benchmarks/fuzz_protocols.py` does this for minutes; what it has found is listed here by name.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2 as pb

from hack.fuzz.described import rounds
from hack.fuzz.send import GrpcSender, HttpSender, Sender, SocketSender
from hack.fuzz.tally import Tally
from mizzen.runtime.engine.errors import EngineBusyError
from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.gateway_house import open_houses
from tests.fixtures.runtime_server import Running, eventually, running_server, running_tiny_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("model")
    async with running_tiny_model(folder, context=128, adapter_root=[folder]) as running:
        yield running


def is_idle(running: Running) -> bool:
    stats = running.service.engine.stats()
    return stats.running + stats.waiting == 0 and stats.blocks_free == stats.blocks_total


async def send_all(sender: Sender, count: int) -> None:
    def run() -> None:
        for _ in range(count):
            sender.send()
        sender.close()

    await asyncio.to_thread(run)


async def test_nothing_comes_of_wrong_http_tensors_messages_and_frames(running: Running) -> None:
    tally, port = Tally(), running.server.ports.http
    await asyncio.gather(
        send_all(HttpSender(running.url, tally, Random(1), part="HTTP", infers=True), 150),
        send_all(GrpcSender(running.grpc_address, tally, Random(2)), 150),
        send_all(SocketSender(("127.0.0.1", port), tally, Random(3), part="socket"), 60),
    )
    assert not tally.findings
    taken = {"HTTP: 200", "HTTP: 400", "gRPC: OK call", "gRPC: OK stream", "gRPC: INVALID_ARGUMENT"}
    assert taken <= tally.answers.keys()
    await eventually(lambda: is_idle(running))
    assert running.service.is_ready()


async def test_nothing_comes_of_what_the_description_allows_and_what_it_forbids(
    running: Running,
) -> None:
    tally = Tally()

    def run() -> list[str]:
        given = {"part": "described", "seed": 4, "examples": 1, "goes_on": lambda: True}
        return list(rounds(running.url, tally, **given))

    operations = await asyncio.to_thread(run)
    assert not tally.findings
    described = (await running.http.get("/openapi.json")).json()["paths"]
    expected = {f"{method.upper()} {path}" for path in described for method in described[path]}
    assert expected - set(operations) == {"GET /openapi.json"}  # where schemathesis reads it
    assert {"described: 200", "described: 400"} <= tally.answers.keys()
    await eventually(lambda: is_idle(running))


async def test_nothing_comes_of_wrong_requests_to_the_gateway(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    tally = Tally()
    async with open_houses() as make_house:
        house = await make_house(upstream=[f"tiny={running.url}"])
        sender = HttpSender(house.url, tally, Random(5), part="gateway", infers=False)
        address = ("127.0.0.1", house.gateway.port)
        with caplog.at_level(logging.ERROR):
            await asyncio.gather(
                send_all(sender, 60),
                send_all(SocketSender(address, tally, Random(6), part="socket"), 60),
            )
    assert not tally.findings
    assert {"gateway: 200", "gateway: 400", "socket: closed"} <= tally.answers.keys()
    # A traceback for each broken request would be a way to fill the disk.
    assert not caplog.records


def chat(**fields: Any) -> tuple[str, bytes, dict[str, str]]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    return "/v1/chat/completions", json.dumps(body).encode(), {}


def said(arguments: str) -> tuple[str, bytes, dict[str, str]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    return chat(messages=[{"role": "user", "content": "x"}, turn])


def infer(*, length: str | None = None, **fields: Any) -> tuple[str, bytes, dict[str, str]]:
    given = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["x"]}
    body = json.dumps({"inputs": [given], **fields}).encode()
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    return "/v2/models/tiny/infer", body, headers


def load(path: str) -> tuple[str, bytes, dict[str, str]]:
    body = json.dumps({"parameters": {"path": path}}).encode()
    return "/v2/repository/models/a/load", body, {}


DEEP = '{"a":' * 5000 + "1" + "}" * 5000
HTTP: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "half a surrogate in a message": chat(messages=[{"role": "user", "content": "\ud800"}]),
    "half a surrogate in a call's arguments": said('{"a": "\\ud800"}'),
    "arguments 5,000 deep": said(DEEP),
    "more kept tokens than a number holds": chat(top_k=2**63),
    "more answer tokens than a number holds": chat(max_tokens=2**70),
    "half a surrogate in a tensor": infer(
        inputs=[{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["\udfff"]}]
    ),
    "a tensor 900 deep": infer(
        inputs=[{"name": "x", "datatype": "BYTES", "data": json.loads("[" * 900 + "]" * 900)}]
    ),
    "a length that is a digit and no number": infer(length="²"),
    "a length of thousands of digits": infer(length="9" * 5000),
    "a timeout before now": infer(parameters={"timeout": -1}),
    "a priority that is true": infer(parameters={"priority": True}),
    "an id that is no text": infer(id=[1]),
    "a NUL in a path": load("/mnt/pvc/\0"),
    "a path longer than there can be": load("/mnt/pvc/" + "x" * 3000),
}


@pytest.mark.parametrize(("path", "body", "headers"), HTTP.values(), ids=HTTP)
async def test_what_a_request_gets_wrong_is_a_400(
    running: Running, path: str, body: bytes, headers: dict[str, str]
) -> None:
    sent = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = await running.http.post(path, content=body, headers=sent)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 2000
    assert running.service.is_ready()


async def test_the_coldest_temperature_there_is_chooses_the_best_token(running: Running) -> None:
    texts = []
    for coldest in (
        {"temperature": 0},
        {"temperature": 1e-40},
        {"temperature": 1e-320},
        {"top_p": 0},
    ):
        path, body, _ = chat(**coldest, max_tokens=8, ignore_eos=True)
        answer = await running.http.post(path, content=body)
        texts.append(answer.json()["choices"][0]["message"]["content"])
    assert texts == texts[:1] * 4


async def test_a_body_that_breaks_off_is_no_failure_of_ours(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        _, writer = await asyncio.open_connection("127.0.0.1", running.server.ports.http)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        await eventually(lambda: running.service.in_flight() == 1)
        writer.close()
        await eventually(lambda: running.service.in_flight() == 0)
    assert not caplog.records


def message(**fields: Any) -> bytes:
    request = pb.ModelInferRequest(model_name="tiny", **fields)
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(struct.pack("<I", 1) + b"x")
    return request.SerializeToString()


def with_timeout(microseconds: int) -> bytes:
    request = pb.ModelInferRequest.FromString(message())
    request.parameters["timeout"].int64_param = microseconds
    return request.SerializeToString()


GRPC: dict[str, tuple[str, bytes, grpc.StatusCode, str]] = {
    "bytes that are no message": (
        *(INFER, b"\xff" * 5),
        *(grpc.StatusCode.INVALID_ARGUMENT, "not a message of this method"),
    ),
    "a health check that is none": (
        *("/grpc.health.v1.Health/Check", b"\x0a\xff"),
        *(grpc.StatusCode.INVALID_ARGUMENT, "not a message of this method"),
    ),
    "a name longer than an answer may be": (
        *(INFER, pb.ModelInferRequest(model_name="é" * 20_000).SerializeToString()),
        *(grpc.StatusCode.NOT_FOUND, "does not exist here|The model 'é"),
    ),
    "a timeout before now": (
        *(INFER, with_timeout(-5)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "timeout: expected an integer between 0"),
    ),
    "a NUL in a path": (
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        pb.RepositoryModelLoadRequest(
            model_name="a",
            parameters={"path": pb.ModelRepositoryParameter(string_param="/mnt/pvc/\0")},
        ).SerializeToString(),
        *(grpc.StatusCode.INVALID_ARGUMENT, "is not a directory"),
    ),
}


@pytest.mark.parametrize(("method", "sent", "code", "text"), GRPC.values(), ids=GRPC)
async def test_what_a_grpc_call_gets_wrong_has_the_code_of_it(
    running: Running, method: str, sent: bytes, code: grpc.StatusCode, text: str
) -> None:
    async with grpc.aio.insecure_channel(running.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=text) as raised:
            await channel.unary_unary(method)(sent)
    assert raised.value.code() is code


async def test_a_stream_is_answered_up_to_the_message_that_cannot_be_read(running: Running) -> None:
    method = INFER.replace("ModelInfer", "ModelStreamInfer")
    async with grpc.aio.insecure_channel(running.grpc_address) as channel:
        call = channel.stream_stream(method)(iter([message(id="1"), b"\xff" * 9, message(id="2")]))
        answer = pb.ModelStreamInferResponse.FromString(await call.read())
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert answer.infer_response.id == "1"
    assert not answer.error_message


async def test_a_full_queue_is_a_429_for_embeddings_too() -> None:
    busy = FakeEngine(refuse=EngineBusyError("The queue is full.", retry_after_s=2))
    async with running_server(busy) as running:
        body = {"model": "tiny", "input": ["a", "b"]}
        answer = await running.http.post("/v1/embeddings", json=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
