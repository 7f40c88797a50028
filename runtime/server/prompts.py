"""Requests become token ids. Long texts are encoded off the event loop."""

import asyncio
from collections.abc import Callable, Sequence

from mizzen.runtime.engine.api import EngineApi
from mizzen.runtime.engine.errors import PromptTooLongError
from mizzen.runtime.server.errors import invalid
from mizzen.runtime.server.schemas import ChatRequest, Prompts

# Encoding takes about a second per million characters; this much is a few milliseconds.
_INLINE_CHARS = 20_000


async def encode_chat(engine: EngineApi, request: ChatRequest) -> tuple[int, ...]:
    """Return the conversation in the model's own chat format."""
    messages = [message.to_template() for message in request.messages]
    tools = request.template_tools()
    size = sum(len(message["content"]) for message in messages) + len(str(tools))
    token_ids = await encode_off_loop(
        lambda: engine.tokenizer.apply_chat_template(messages, tools), size
    )
    return _checked(engine, token_ids, param="messages")


async def encode_prompts(
    engine: EngineApi, prompts: Prompts, *, param: str
) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt, given as text or as tokens."""
    return [await _encode_prompt(engine, prompt, param) for prompt in prompts]


async def encode_text(engine: EngineApi, text: str, *, param: str) -> tuple[int, ...]:
    """Return one text's token ids."""
    token_ids = await encode_off_loop(lambda: engine.tokenizer.encode(text), len(text))
    return _checked(engine, token_ids, param=param)


async def _encode_prompt(
    engine: EngineApi, prompt: str | Sequence[int], param: str
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return await encode_text(engine, prompt, param=param)
    largest = engine.tokenizer.vocab_size - 1
    if max(prompt) > largest:
        raise invalid(param, f"{param}: token ids go up to {largest} in this model.")
    return _checked(engine, prompt, param=param)


async def encode_off_loop(encode: Callable[[], list[int]], chars: int) -> list[int]:
    """Return `encode()`, called in a thread where its text is long."""
    return encode() if chars <= _INLINE_CHARS else await asyncio.to_thread(encode)


def _checked(engine: EngineApi, token_ids: Sequence[int], *, param: str) -> tuple[int, ...]:
    if not token_ids:
        raise invalid(param, f"{param}: the prompt is empty; send at least one token.")
    if len(token_ids) >= engine.model_len:
        error = PromptTooLongError(prompt_tokens=len(token_ids), model_len=engine.model_len)
        raise invalid(param, str(error), code="context_length_exceeded") from error
    return tuple(token_ids)
