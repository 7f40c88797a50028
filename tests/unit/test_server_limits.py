"""Bodies over the limit: refused early, on both ways a client can announce them."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from tests.fixtures.fake_engine import FakeEngine
from tests.fixtures.runtime_server import Running, running_server
from tests.fixtures.triton_tensors import tensors

CHAT = "/v1/chat/completions"
MIB = 1 << 20


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    async with running_server(FakeEngine()) as running:
        yield running


async def test_a_body_of_50_mb_is_a_413(running: Running) -> None:
    answer = await running.http.post(CHAT, content=b"x" * 50_000_000)
    assert answer.status_code == 413
    assert "8388608 bytes" in answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "request_too_large"
    assert (await running.http.get("/v1/models")).status_code == 200


async def test_an_announced_size_is_refused_before_the_body_is_sent(running: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.ports.http)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 50000000\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413")
    assert b"connection: close" in head.lower()
    await reader.read()  # the server ends the connection; the rest was never asked for
    writer.close()


async def test_a_chunked_body_is_refused_when_it_passes_the_limit(running: Running) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.ports.http)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    chunk = b"%x\r\n" % MIB + b"x" * MIB + b"\r\n"
    sent = 0
    answered = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    while not answered.done() and sent < 50:
        writer.write(chunk)
        drained = asyncio.ensure_future(writer.drain())
        await asyncio.wait((answered, drained), return_when=asyncio.FIRST_COMPLETED)
        sent += 1
    assert (await answered).startswith(b"HTTP/1.1 413")
    assert sent < 20
    writer.close()


async def test_a_body_below_the_limit_is_read(running: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * (4 * MIB)}]}
    answer = await running.http.post(CHAT, content=json.dumps(body))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_grpc_message_over_the_limit_is_refused(running: Running) -> None:
    inputs = tensors(tritonclient.grpc.aio, text_input=b"x" * (9 * MIB))
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        with pytest.raises(InferenceServerException) as caught:
            await client.infer("tiny", inputs)
        assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert await client.is_server_live()
