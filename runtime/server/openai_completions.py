"""POST /v1/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from starlette.types import ASGIApp

from mizzen.runtime.engine.api import TokenizerApi, TokenOutput
from mizzen.runtime.server.choices import Choice, Outputs, Usage, run_choices
from mizzen.runtime.server.errors import invalid
from mizzen.runtime.server.openai_chunks import DONE, ChunkWriter, quoted
from mizzen.runtime.server.openai_logprobs import CompletionLogprobs
from mizzen.runtime.server.openai_scores import score_prompts
from mizzen.runtime.server.prompts import encode_prompts
from mizzen.runtime.server.routes import EventStream, json_response
from mizzen.runtime.server.schemas import MAX_CHOICES, CompletionRequest
from mizzen.runtime.server.service import Service


async def completions(service: Service, asked: CompletionRequest) -> ASGIApp:
    """Continue each prompt, whole or as a stream; or say how likely it is."""
    adapter = service.resolve(asked.model)
    engine = service.engine
    count = len(asked.prompts()) * asked.n
    if count > 2 * MAX_CHOICES:
        raise invalid("n", f"n: prompts times n is {count}; at most {2 * MAX_CHOICES} are served.")
    prompts = await encode_prompts(engine, asked.prompts(), param="prompt")
    if asked.is_score:
        return json_response(await score_prompts(service, asked, prompts, adapter))
    outputs = run_choices(service, asked, prompts, asked.params(), adapter, continues_text=True)
    answer = _Answer(asked, engine.tokenizer, _echoes(asked, engine.tokenizer, prompts))
    if asked.stream:
        return await EventStream.start(answer.stream(outputs))
    return json_response(await answer.whole(outputs))


def _echoes(
    asked: CompletionRequest, tokenizer: TokenizerApi, prompts: list[tuple[int, ...]]
) -> list[str]:
    """Return the text each choice begins with: its prompt, where the client wants it back."""
    if not asked.echo:
        return [""] * (len(prompts) * asked.n)
    texts = [
        given if isinstance(given, str) else tokenizer.decode(given) for given in asked.prompts()
    ]
    return [text for text in texts for _ in range(asked.n)]


@dataclass(slots=True)
class _Answer:
    asked: CompletionRequest
    tokenizer: TokenizerApi
    echoes: list[str]
    answer_id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self, outputs: Outputs) -> dict[str, object]:
        choices, usage = [Choice([echo]) for echo in self.echoes], Usage(self.asked.n)
        async with aclosing(outputs):
            async for index, output in outputs:
                choices[index].add(output)
                usage.add(index, output)
        return {
            "id": self.answer_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.asked.model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": usage.body(),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, object]:
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = CompletionLogprobs(self.tokenizer).body(choice.logprobs)
        return {
            "index": index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    async def stream(self, outputs: Outputs) -> AsyncGenerator[bytes, None]:
        writer = ChunkWriter(
            answer_id=self.answer_id,
            kind="text_completion",
            created=self.created,
            model=self.asked.model,
            include_usage=self.asked.include_usage,
        )
        usage, pending = Usage(self.asked.n), dict(enumerate(self.echoes))
        logprobs = [CompletionLogprobs(self.tokenizer) for _ in self.echoes]
        async with aclosing(outputs):
            async for index, output in outputs:
                usage.add(index, output)
                text = pending.pop(index, "") + output.text
                if chunk := _chunk(writer, index, text, output, logprobs[index]):
                    yield chunk
        if self.asked.include_usage:
            yield writer.usage(usage.body())
        yield DONE


def _chunk(
    writer: ChunkWriter, index: int, text: str, output: TokenOutput, logprobs: CompletionLogprobs
) -> bytes:
    if output.finish_reason is None and not output.logprobs:
        return writer.text(index, f'"text":{quoted(text)}') if text else b""
    return writer.choice(
        index,
        {
            "text": text,
            "logprobs": logprobs.body(output.logprobs) if output.logprobs else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        },
    )
