"""One span for each request, where OpenTelemetry has somewhere to send it; else nothing at all.

The standard's own variables say where: OTEL_EXPORTER_OTLP_ENDPOINT and those beside it. Without one
no package of OpenTelemetry is imported.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

log = logging.getLogger(__name__)

Value = str | bool | int | float | list[str]

# What is asked at an address, in the words of the GenAI conventions.
OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Span:
    """What is known of one request. This one forgets it all."""

    def name(self, operation: str, model: str) -> None:
        """Say what is asked, and which model."""

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Set attributes."""

    def add(self, amounts: Mapping[str, int]) -> None:
        """Add to attributes that count; none is 0."""

    def append(self, attribute: str, text: str) -> None:
        """Put a text behind those that an attribute has."""

    def answered(self, status: int) -> None:
        """Say how it was answered, with HTTP's status."""

    def failed(self, kind: str, *, is_ours: bool = True) -> None:
        """Say what kind of failure it ended with, and whether it is this side's."""

    def headers(self) -> dict[str, str]:
        """Return the headers that make what is sent with them a part of this."""
        return {}


class Tracing:
    """Makes spans. This one makes none."""

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Have a span while the block runs, part of the trace that `headers` may name."""
        yield NO_SPAN

    def close(self) -> None:
        """Send what is left."""


NO_SPAN = Span()
NO_TRACING = Tracing()
# Of the request that is being answered: what runs below the protocols adds what it knows.
current_span: ContextVar[Span] = ContextVar("current_span", default=NO_SPAN)


def start_tracing(service: str) -> Tracing:
    """Return what traces this process, called `service` unless OTEL_SERVICE_NAME names it."""
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return NO_TRACING
    try:
        from mizzen.runtime.otlp import OtlpTracing  # noqa: PLC0415 - nobody else pays for it
    except ImportError as error:
        log.error("not traced: %s; install mizzen with its extra 'tracing'", error)
        return NO_TRACING
    return OtlpTracing(service)
