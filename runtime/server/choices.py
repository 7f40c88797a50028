"""One client request as several sequences: the answers asked for with `n` and many prompts."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from mizzen.runtime.engine.api import FinishReason, SamplingParams, TokenLogprob, TokenOutput
from mizzen.runtime.server.schemas import OpenAIRequest
from mizzen.runtime.server.service import Service

Outputs = AsyncGenerator[tuple[int, TokenOutput], None]


@dataclass(slots=True)
class Choice:
    """One answer, put together from its outputs."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def text(self) -> str:
        """The whole text so far."""
        return "".join(self.pieces)

    def add(self, output: TokenOutput) -> None:
        """Take the next output."""
        self.pieces.append(output.text)
        self.logprobs.extend(output.logprobs)
        self.finish_reason = output.finish_reason
        self.stop_reason = output.stop_reason


@dataclass(slots=True)
class Usage:
    """Tokens of a whole client request; a prompt counts once however many answers it gets."""

    n: int
    prompt: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    completion: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, output: TokenOutput) -> None:
        """Take an output of choice `index`."""
        self.completion[index] = output.output_tokens
        if index % self.n == 0:
            self.prompt[index] = output.prompt_tokens
            self.cached[index] = output.cached_tokens

    def body(self) -> dict[str, object]:
        """Return the usage as OpenAI clients read it."""
        prompt, completion = sum(self.prompt.values()), sum(self.completion.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


def run_choices(
    service: Service,
    request: OpenAIRequest,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    adapter: str | None,
    *,
    continues_text: bool,
) -> Outputs:
    """Yield (choice index, output) of `n` answers to each prompt, as they come."""
    runs = [
        service.generate(
            prompt,
            _seeded(sampling, place),
            adapter=adapter,
            priority=request.priority,
            cache_salt=request.cache_salt,
            place=place,
            continues_text=continues_text,
        )
        for prompt in prompts
        for place in range(request.n)
    ]
    return _single(runs[0]) if len(runs) == 1 else _merged(runs)


def _seeded(sampling: SamplingParams, place: int) -> SamplingParams:
    # Equal seeds would make all n answers equal.
    if sampling.seed is None or place == 0:
        return sampling
    return replace(sampling, seed=sampling.seed + place)


async def _single(run: AsyncGenerator[TokenOutput, None]) -> Outputs:
    async with aclosing(run):
        async for output in run:
            yield 0, output


async def _merged(runs: Sequence[AsyncGenerator[TokenOutput, None]]) -> Outputs:
    ready: asyncio.Queue[tuple[int, TokenOutput] | Exception | None] = asyncio.Queue()

    async def pump(index: int, run: AsyncGenerator[TokenOutput, None]) -> None:
        try:
            async with aclosing(run):
                async for output in run:
                    ready.put_nowait((index, output))
        except Exception as error:
            ready.put_nowait(error)
        else:
            ready.put_nowait(None)

    tasks = [asyncio.ensure_future(pump(index, run)) for index, run in enumerate(runs)]
    try:
        open_runs = len(tasks)
        while open_runs:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_runs -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
