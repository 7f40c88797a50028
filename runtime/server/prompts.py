"""Requests become token ids. Long texts are encoded off the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mizzen.runtime.engine.api import EngineApi
from mizzen.runtime.engine.errors import PromptTooLongError
from mizzen.runtime.server.errors import invalid
from mizzen.runtime.server.schemas import ChatRequest, Prompts

Result = TypeVar("Result")

# Encoding takes about a second per million characters; this much is a few milliseconds.
_INLINE_CHARS = 20_000


async def encode_chat(engine: EngineApi, request: ChatRequest) -> tuple[int, ...]:
    """Return the conversation in the model's own chat format."""
    turns = [message.to_template() for message in request.messages]
    tools = request.template_tools()
    token_ids = await off_loop(
        lambda: engine.tokenizer.apply_chat_template(turns, tools),
        chars=chars_of(turns) + len(str(tools)),
    )
    return _checked(engine, token_ids, param="messages")


async def encode_prompts(
    engine: EngineApi, prompts: Prompts, *, param: str
) -> list[tuple[int, ...]]:
    """Return the token ids of each prompt, given as text or as tokens."""

    def encode() -> list[Sequence[int]]:
        return [engine.tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

    largest = engine.tokenizer.vocab_size - 1
    for prompt in prompts:
        if not isinstance(prompt, str) and max(prompt) > largest:
            raise invalid(param, f"{param}: token ids go up to {largest} in this model.")
    chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    encoded = await off_loop(encode, chars=chars)
    return [_checked(engine, token_ids, param=param) for token_ids in encoded]


async def encode_text(engine: EngineApi, text: str, *, param: str) -> tuple[int, ...]:
    """Return one text's token ids."""
    (token_ids,) = await encode_prompts(engine, [text], param=param)
    return token_ids


async def off_loop(work: Callable[[], Result], *, chars: int) -> Result:
    """Return `work()`, called in a thread where it is about many characters."""
    return work() if chars <= _INLINE_CHARS else await asyncio.to_thread(work)


def chars_of(turns: Sequence[Mapping[str, object]]) -> int:
    """Return about how long the turns of a conversation are, with the calls they made."""
    return sum(len(str(turn)) for turn in turns)


def _checked(engine: EngineApi, token_ids: Sequence[int], *, param: str) -> tuple[int, ...]:
    if not token_ids:
        raise invalid(param, f"{param}: the prompt is empty; send at least one token.")
    if len(token_ids) >= engine.model_len:
        error = PromptTooLongError(prompt_tokens=len(token_ids), model_len=engine.model_len)
        raise invalid(param, str(error), code="context_length_exceeded") from error
    return tuple(token_ids)
