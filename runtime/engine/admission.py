"""Checks a request before it becomes a sequence, so that no request can stop the loop."""

from collections.abc import Sequence

from mizzen.runtime.engine.api import GenerationRequest, SamplingParams, ScoreRequest
from mizzen.runtime.engine.errors import InvalidRequestError, PromptTooLongError

MAX_LOGPROBS = 100
MAX_STOPS = 64
MAX_SAMPLES = 1024
MOST = 2**31 - 1  # of any count: the loop's tensors hold no more, and failing there ends them all


def check_request(request: GenerationRequest, *, vocab_size: int) -> None:
    """Raise InvalidRequestError, naming the parameter, its value and its range."""
    _check_prompt(request.prompt_token_ids, vocab_size)
    _check_sampling(request.sampling, vocab_size)


def check_scored(request: ScoreRequest, *, vocab_size: int, model_len: int) -> None:
    """Raise InvalidRequestError or PromptTooLongError, naming what is wrong with the request."""
    _check_prompt(request.token_ids, vocab_size)
    if len(request.token_ids) >= model_len:
        raise PromptTooLongError(prompt_tokens=len(request.token_ids), model_len=model_len)
    _check_range("temperature", request.temperature, 1e-5, 100)
    _check_range("prompt_logprobs", request.alternatives, 0, MAX_LOGPROBS)
    _check_range("prompt_samples", request.samples, 0, MAX_SAMPLES)
    _check_range("seed", request.seed, 0, 2**63 - 1)


def _check_prompt(token_ids: Sequence[int], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequestError("The prompt is empty. Send at least one token.")
    if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequestError(f"A prompt token id is not between 0 and {vocab_size - 1}.")


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    _check_range("temperature", params.temperature, 0, 100)
    _check_range("top_p", params.top_p, 0, 1)
    _check_range("min_p", params.min_p, 0, 1)
    _check_range("top_k", params.top_k, 0, MOST)
    _check_range("presence_penalty", params.presence_penalty, -2, 2)
    _check_range("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_range("repetition_penalty", params.repetition_penalty, 0.01, 100)
    _check_range("min_tokens", params.min_tokens, 0, MOST)
    if params.max_tokens is not None:
        _check_range("max_tokens", params.max_tokens, 1, MOST)
        _check_range("min_tokens", params.min_tokens, 0, params.max_tokens)
    if params.logprobs is not None:
        _check_range("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _check_range("number of stop strings", len(params.stop), 0, MAX_STOPS)
    _check_range("number of stop token ids", len(params.stop_token_ids), 0, MAX_STOPS)
    for token_id in (*params.logit_bias, *params.stop_token_ids):
        _check_range("token id", token_id, 0, vocab_size - 1)
    for bias in params.logit_bias.values():
        _check_range("logit_bias", bias, -100, 100)


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # false for NaN too
        raise InvalidRequestError(f"{name} is {value}; it must be between {low} and {high}.")
