"""POST /v1/completions with `max_tokens` 0: what the model thinks of the prompts themselves.

Answered in moments in which nobody asks for text, and counted among no one's requests: that is for
trainers, whose teacher is a model that also serves.
"""

import asyncio
import time
import uuid

from mizzen.runtime.engine.api import PromptScores, ScoreRequest, TokenizerApi, TokenLogprob
from mizzen.runtime.server.errors import invalid, to_api_error
from mizzen.runtime.server.openai_logprobs import finite, token_text
from mizzen.runtime.server.schemas import CompletionRequest
from mizzen.runtime.server.service import Service

# Of an answer, which is in memory whole: 8,192 tokens with 1,023 samples each take about 300 MB.
_MOST_NUMBERS = 2**23


async def score_prompts(
    service: Service,
    asked: CompletionRequest,
    prompts: list[tuple[int, ...]],
    adapter: str | None,
) -> dict[str, object]:
    """Return the answer's body, a choice for each prompt.

    Raises:
        ApiError: what the engine had against one of them, or that it is busy.
    """
    _check_size(asked, prompts)
    requests = [
        ScoreRequest(
            token_ids=prompt,
            adapter=adapter,
            temperature=asked.temperature,
            alternatives=asked.prompt_logprobs or 0,
            samples=asked.prompt_samples or 0,
            seed=(asked.seed or 0) + place,
        )
        for place, prompt in enumerate(prompts)
    ]
    engine = service.engine
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.score(request)) for request in requests]
    except* Exception as errors:
        error = to_api_error(errors.exceptions[0])
        service.metrics.reject(error)
        raise error from None
    return _body(asked, engine.tokenizer, prompts, [task.result() for task in tasks])


def _check_size(asked: CompletionRequest, prompts: list[tuple[int, ...]]) -> None:
    places = sum(len(prompt) for prompt in prompts)
    numbers = places * (1 + (asked.prompt_logprobs or 0) + (asked.prompt_samples or 0))
    if numbers > _MOST_NUMBERS:
        raise invalid(
            "prompt",
            f"prompt: the answer would have {numbers} numbers, and {_MOST_NUMBERS} are the most. "
            "Send fewer prompts at a time, or ask for fewer prompt_samples or prompt_logprobs.",
        )


def _body(
    asked: CompletionRequest,
    tokenizer: TokenizerApi,
    prompts: list[tuple[int, ...]],
    scores: list[PromptScores],
) -> dict[str, object]:
    tokens = sum(len(prompt) for prompt in prompts)
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
        # Who compares distributions must know that both are over the same tokens.
        "vocabulary": tokenizer.vocabulary_digest,
        "choices": [_choice(asked, tokenizer, at, each) for at, each in enumerate(scores)],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
    }


def _choice(
    asked: CompletionRequest, tokenizer: TokenizerApi, index: int, scores: PromptScores
) -> dict[str, object]:
    choice: dict[str, object] = {
        "index": index,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
    }
    # The first token has nothing before it: vLLM says null.
    if asked.prompt_logprobs is not None:
        choice["prompt_logprobs"] = [None, *(_place(tokenizer, e) for e in scores.logprobs)]
    if asked.prompt_samples is not None:
        choice["prompt_samples"] = [None, *scores.drawn]
    return choice


def _place(tokenizer: TokenizerApi, entry: TokenLogprob) -> dict[str, dict[str, object]]:
    """Return vLLM's shape: the token and its alternatives by id."""
    values = {**dict(entry.top), entry.token_id: entry.logprob}
    return {
        str(token_id): {"logprob": finite(value), "decoded_token": token_text(tokenizer, token_id)}
        for token_id, value in values.items()
    }
