"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.engine.api import TokenizerApi, TokenOutput
from mizzen.runtime.server.choices import Choice, Outputs, Usage, run_choices
from mizzen.runtime.server.openai_chunks import DONE, ChunkWriter, quoted
from mizzen.runtime.server.openai_logprobs import chat_logprobs
from mizzen.runtime.server.openai_request import parse
from mizzen.runtime.server.prompts import encode_chat
from mizzen.runtime.server.routes import EventStream, json_response
from mizzen.runtime.server.schemas import ChatRequest
from mizzen.runtime.server.service import Service


async def chat_completions(service: Service, request: Request) -> ASGIApp:
    """Answer one conversation, whole or as a stream."""
    asked = await parse(service, request, ChatRequest)
    adapter = service.resolve(asked.model)
    engine = service.engine
    prompt = await encode_chat(engine, asked)
    outputs = run_choices(service, asked, [prompt], asked.params(), adapter)
    if asked.stream:
        return await EventStream.start(_stream(asked, outputs, engine.tokenizer))
    return json_response(await _whole(asked, outputs, engine.tokenizer))


async def _whole(
    asked: ChatRequest, outputs: Outputs, tokenizer: TokenizerApi
) -> dict[str, object]:
    choices, usage = [Choice() for _ in range(asked.n)], Usage(asked.n)
    async with aclosing(outputs):
        async for index, output in outputs:
            choices[index].add(output)
            usage.add(index, output)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": chat_logprobs(tokenizer, choice.logprobs) if asked.logprobs else None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage.body(),
    }


async def _stream(
    asked: ChatRequest, outputs: Outputs, tokenizer: TokenizerApi
) -> AsyncGenerator[bytes, None]:
    writer = ChunkWriter(
        answer_id=f"chatcmpl-{uuid.uuid4().hex}",
        kind="chat.completion.chunk",
        created=int(time.time()),
        model=asked.model,
        include_usage=asked.include_usage,
    )
    usage, begun = Usage(asked.n), set[int]()
    async with aclosing(outputs):
        async for index, output in outputs:
            usage.add(index, output)
            chunk = _chunk(writer, index, output, tokenizer)
            if index not in begun:
                begun.add(index)
                chunk = writer.text(index, '"delta":{"role":"assistant","content":""}') + chunk
            if chunk:
                yield chunk
    if asked.include_usage:
        yield writer.usage(usage.body())
    yield DONE


def _chunk(writer: ChunkWriter, index: int, output: TokenOutput, tokenizer: TokenizerApi) -> bytes:
    if output.finish_reason is None and not output.logprobs:
        if not output.text:
            return b""  # withheld: it may still become a character or a stop string
        return writer.text(index, f'"delta":{{"content":{quoted(output.text)}}}')
    return writer.choice(
        index,
        {
            "delta": {"content": output.text} if output.text else {},
            "logprobs": chat_logprobs(tokenizer, output.logprobs) if output.logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        },
    )
