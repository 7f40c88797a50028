"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.types import ASGIApp

from mizzen.runtime.engine.api import FinishReason, TokenizerApi, TokenOutput
from mizzen.runtime.server.choices import Choice, Outputs, Usage, run_choices
from mizzen.runtime.server.openai_chunks import DONE, ChunkWriter, quoted
from mizzen.runtime.server.openai_logprobs import chat_logprobs
from mizzen.runtime.server.prompts import encode_chat
from mizzen.runtime.server.routes import EventStream, json_response
from mizzen.runtime.server.schemas import ChatRequest
from mizzen.runtime.server.service import Service
from mizzen.runtime.server.tools import ToolReader, read_tools


async def chat_completions(service: Service, asked: ChatRequest) -> ASGIApp:
    """Answer one conversation, whole or as a stream."""
    adapter = service.resolve(asked.model)
    engine = service.engine
    prompt = await encode_chat(engine, asked)
    params = asked.params(in_tags=engine.tokenizer.calls_in_tags)
    outputs = run_choices(service, asked, [prompt], params, adapter, continues_text=False)
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
                "message": (message := _message(asked, choice.text)),
                "logprobs": chat_logprobs(tokenizer, choice.logprobs) if asked.logprobs else None,
                "finish_reason": _reason(choice.finish_reason, has_calls="tool_calls" in message),
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
    names = _tool_names(asked)
    parallel = asked.parallel_tool_calls
    readers = [ToolReader(names, parallel=parallel) if names else None for _ in range(asked.n)]
    async with aclosing(outputs):
        async for index, output in outputs:
            usage.add(index, output)
            chunk = _chunk(writer, index, output, tokenizer, readers[index])
            if index not in begun:
                begun.add(index)
                chunk = writer.text(index, '"delta":{"role":"assistant","content":""}') + chunk
            if chunk:
                yield chunk
    if asked.include_usage:
        yield writer.usage(usage.body())
    yield DONE


def _chunk(
    writer: ChunkWriter,
    index: int,
    output: TokenOutput,
    tokenizer: TokenizerApi,
    reader: ToolReader | None,
) -> bytes:
    ends, logprobs = output.finish_reason is not None, output.logprobs
    if reader is None and not ends and not logprobs:
        if not output.text:
            return b""  # withheld: it may still become a character or a stop string
        return writer.text(index, f'"delta":{{"content":{quoted(output.text)}}}')
    deltas = [{"content": output.text}] if output.text else []
    if reader is not None:
        deltas = [*reader.push(output.text), *(reader.finish() if ends else ())]
    if not deltas and (ends or logprobs):
        deltas = [{}]
    chunks = []
    for place, delta in enumerate(deltas):
        fields: dict[str, object] = {"delta": delta, "logprobs": None, "finish_reason": None}
        if place == 0 and logprobs:
            fields["logprobs"] = chat_logprobs(tokenizer, logprobs)
        if place == len(deltas) - 1 and ends:
            called = reader is not None and reader.has_calls
            fields["finish_reason"] = _reason(output.finish_reason, has_calls=called)
            fields["stop_reason"] = output.stop_reason
        chunks.append(writer.choice(index, fields))
    return b"".join(chunks)


def _tool_names(asked: ChatRequest) -> frozenset[str]:
    return frozenset(tool.function.name for tool in asked.callable_tools())


def _message(asked: ChatRequest, text: str) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": text, "refusal": None}
    if names := _tool_names(asked):
        said, calls = read_tools(text, names, parallel=asked.parallel_tool_calls)
        message["content"] = said or (None if calls else "")
        if calls:
            message["tool_calls"] = calls
    return message


def _reason(reason: FinishReason | None, *, has_calls: bool) -> str | None:
    # An answer cut at its length stays cut, whatever it was about to call.
    return "tool_calls" if has_calls and reason == "stop" else reason
