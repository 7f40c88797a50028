"""A client that goes while its prompt is computed; `test_server_real_engine` has later ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import tritonclient.grpc.aio

from tests.fixtures.runtime_server import Running, eventually, running_tiny_model
from tests.fixtures.triton_tensors import tensors

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Four tokens a step: the prompt takes thousands of steps, far longer than a client needs to go.
PROMPT = "x" * 15_000
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder: Path = tmp_path_factory.mktemp("model")
    limits = {"max_num_batched_tokens": 4, "max_num_seqs": 2}
    async with running_tiny_model(folder, context=16_384, **limits) as running:
        yield running


async def sse(running: Running) -> None:
    async with running.http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as it:
        await it.aread()


async def http(running: Running) -> None:
    await running.http.post("/v1/completions", json=BODY)


async def embedding(running: Running) -> None:
    await running.http.post("/v1/embeddings", json={"model": "tiny", "input": PROMPT})


async def inference_http(running: Running) -> None:
    given = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}
    await running.http.post("/v2/models/tiny/infer", json={"inputs": [given]})


async def inference_grpc(running: Running) -> None:
    inputs = tensors(tritonclient.grpc.aio, text_input=PROMPT.encode())
    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        await client.infer("tiny", inputs)


async def inference_grpc_stream(running: Running) -> None:
    async def one() -> AsyncIterator[dict[str, Any]]:
        inputs = tensors(tritonclient.grpc.aio, text_input=PROMPT.encode(), stream=True)
        yield {"model_name": "tiny", "inputs": inputs}
        await asyncio.Event().wait()  # the client keeps its side open

    async with tritonclient.grpc.aio.InferenceServerClient(running.grpc_address) as client:
        async for _ in client.stream_infer(one()):
            pass


CALLS: dict[str, Callable[[Running], Coroutine[Any, Any, None]]] = {
    "a stream": sse,
    "an answer": http,
    "an embedding": embedding,
    "an inference over HTTP": inference_http,
    "an inference over gRPC": inference_grpc,
    "a stream over gRPC": inference_grpc_stream,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_client_that_goes_in_mid_prompt_leaves_nothing(
    running: Running, call: Callable[[Running], Coroutine[Any, Any, None]]
) -> None:
    engine = running.service.engine
    before = engine.stats()
    client = asyncio.create_task(call(running))
    await eventually(lambda: engine.stats().running == 1 and engine.stats().steps > before.steps)
    client.cancel()
    await asyncio.wait((client,))

    def is_free() -> bool:
        stats = engine.stats()
        return stats.running + stats.waiting == 0 and stats.blocks_free == stats.blocks_total

    await eventually(is_free)
    assert running.service.in_flight() == 0
    after = engine.stats()
    # It was ended on the way, and what is counted when a prompt is done was not.
    assert after.prompt_tokens == before.prompt_tokens
    assert after.steps - before.steps < len(PROMPT) / 4
