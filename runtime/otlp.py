"""Spans that are sent as OTLP over HTTP, by a thread of their own.

Attributes have the names of OpenTelemetry's GenAI conventions, and vLLM's (`gen_ai.latency.*`)
for what those do not name.
"""

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mizzen.runtime.tracing import Span, Tracing, Value, current_span

_FLUSH_S = 3.0  # a collector that is gone must not hold up the end of a pod
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpSpan(Span):
    """A request's span."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def name(self, operation: str, model: str) -> None:
        """Say what is asked, and which model."""
        self._span.update_name(f"{operation} {model}")
        self.note({"gen_ai.operation.name": operation, "gen_ai.request.model": model})

    def note(self, attributes: Mapping[str, Value]) -> None:
        """Set attributes."""
        self._span.set_attributes(attributes)

    def add(self, amounts: Mapping[str, int]) -> None:
        """Add to attributes that count; none is 0."""
        known = self._known()
        self.note({name: known.get(name, 0) + amount for name, amount in amounts.items()})

    def append(self, attribute: str, text: str) -> None:
        """Put a text behind those that an attribute has."""
        self.note({attribute: [*self._known().get(attribute, ()), text]})

    def answered(self, status: int) -> None:
        """Say how it was answered, with HTTP's status."""
        self.note({"http.response.status_code": status})
        if status >= 400 and "error.type" not in self._known():
            self.failed(str(status), is_ours=status >= 500)

    def failed(self, kind: str, *, is_ours: bool = True) -> None:
        """Say what kind of failure it ended with, and whether it is this side's."""
        self.note({"error.type": kind})
        if is_ours:
            self._span.set_status(Status(StatusCode.ERROR))

    def _known(self) -> Mapping[str, Any]:
        # A span that is not sampled has no attributes, not even empty ones.
        return getattr(self._span, "attributes", None) or {}

    def headers(self) -> dict[str, str]:
        """Return the headers that make what is sent with them a part of this."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._span))
        return carrier


class OtlpTracing(Tracing):
    """Sends where the OTEL_* variables say."""

    def __init__(self, service: str) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME", service)
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("mizzen")

    @contextmanager
    def request(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """Have a span while the block runs, part of the trace that `headers` may name."""
        carrier = {name.lower(): value for name, value in headers.items()}
        span = self._tracer.start_span(
            name,
            context=_PROPAGATOR.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.provider.name": "mizzen"},
        )
        mine = OtlpSpan(span)
        token = current_span.set(mine)
        try:
            yield mine
        except asyncio.CancelledError:
            mine.failed("client_gone", is_ours=False)
            raise
        except BaseException as error:
            status = getattr(error, "status", None)
            if isinstance(status, int):
                mine.answered(status)
            else:
                mine.failed(type(error).__name__)
            raise
        finally:
            current_span.reset(token)
            span.end()

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""
        flush = threading.Thread(target=self._provider.shutdown, daemon=True)
        flush.start()
        flush.join(_FLUSH_S)
