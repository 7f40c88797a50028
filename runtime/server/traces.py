"""What a request's span says of its sequences.

Names are of OpenTelemetry's GenAI conventions; those of the engine's phases are vLLM's.
"""

from mizzen.runtime.engine.api import FinishedRequest, GenerationRequest
from mizzen.runtime.tracing import Span


def trace_asked(span: Span, request: GenerationRequest) -> None:
    """Note how a sequence is to be sampled."""
    sampling = request.sampling
    span.note({"gen_ai.request.temperature": float(sampling.temperature)})
    span.note({"gen_ai.request.top_p": float(sampling.top_p)})
    if sampling.max_tokens is not None:
        span.note({"gen_ai.request.max_tokens": sampling.max_tokens})


def trace_finished(span: Span, finished: FinishedRequest, *, place: int) -> None:
    """Note a sequence's tokens, its end and its times; of several, the times of the last to end."""
    span.append("gen_ai.response.finish_reasons", finished.finish_reason)
    span.add({"gen_ai.usage.output_tokens": finished.output_tokens})
    if place == 0:
        span.add(
            {
                "gen_ai.usage.input_tokens": finished.prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": finished.cached_tokens,
            }
        )
    span.note(
        {
            "gen_ai.latency.time_in_queue": finished.queue_s,
            "gen_ai.latency.time_in_model_prefill": finished.prefill_s,
            "gen_ai.latency.time_in_model_decode": finished.decode_s,
            "gen_ai.latency.time_to_first_token": finished.queue_s + finished.prefill_s,
            "gen_ai.latency.e2e": finished.e2e_s,
        }
    )
