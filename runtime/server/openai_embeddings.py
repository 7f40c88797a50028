"""POST /v1/embeddings: a text as the model's last hidden state, of length one."""

import asyncio
import base64
import math
import struct
from array import array

from starlette.types import ASGIApp

from mizzen.runtime.engine.api import SamplingParams
from mizzen.runtime.server.prompts import encode_prompts
from mizzen.runtime.server.routes import json_response
from mizzen.runtime.server.schemas import EmbeddingRequest
from mizzen.runtime.server.service import Service

_AT_ONCE = 64  # of one request's inputs: the engine's queue is everybody's


async def embeddings(service: Service, asked: EmbeddingRequest) -> ASGIApp:
    """Embed each input; many of them run in the engine at once."""
    adapter = service.resolve(asked.model)
    prompts = await encode_prompts(service.engine, asked.inputs(), param="input")
    room = asyncio.Semaphore(_AT_ONCE)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_embed(service, prompt, adapter, room)) for prompt in prompts
            ]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    vectors = [task.result() for task in tasks]
    tokens = sum(len(prompt) for prompt in prompts)
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(vector, asked)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": asked.model, "usage": usage})


async def _embed(
    service: Service, prompt: tuple[int, ...], adapter: str | None, room: asyncio.Semaphore
) -> list[float]:
    params = SamplingParams(embed=True, max_tokens=1)
    async with room:
        outputs = [output async for output in service.generate(prompt, params, adapter=adapter)]
    vector = outputs[-1].embedding
    assert vector is not None, "asked for"
    length = math.hypot(*vector)
    return array("f", [value / length for value in vector]).tolist()


def _encode(vector: list[float], asked: EmbeddingRequest) -> list[float] | str:
    if asked.encoding_format == "base64":
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return vector
