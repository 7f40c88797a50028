"""How an HTTP app is put together here: guarded routes, bounded bodies, watched connections."""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mizzen.runtime.server.access import Access, Gate
from mizzen.runtime.server.errors import ApiError, to_api_error
from mizzen.runtime.tracing import NO_TRACING, OPERATIONS, Span, Tracing, current_span

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
RenderError = Callable[[str, ApiError], Mapping[str, object]]  # path, error -> JSON body

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class GuardedRoute(Route):
    """A route with an access class; there is no way to make one without.

    `body` is the model of the JSON it takes, for the description of the port.
    """

    def __init__(
        self,
        method: str,
        path: str,
        endpoint: Endpoint,
        access: Access,
        *,
        body: type[BaseModel] | None = None,
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.access = access
        self.body = body

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check who calls, then answer."""
        request = Request(scope)
        gate: Gate = request.app.state.gate
        refusal = gate.check(
            self.access,
            authorization=request.headers.get("authorization", ""),
            peer=_peer(request),
        )
        if refusal:
            raise ApiError(refusal.status, refusal.message, code="invalid_credentials")
        await super().handle(scope, receive, send)


# Sent by browsers and proxies: whoever speaks through one is not this machine's own user, even
# where the connection itself comes from loopback.
_FROM_ELSEWHERE = ("origin", "sec-fetch-site", "forwarded", "x-forwarded-for", "via")


def _peer(request: Request) -> str:
    """Return the caller's address, "" where it only seems to be known."""
    if request.client is None or any(name in request.headers for name in _FROM_ELSEWHERE):
        return ""
    return request.client.host


def build_http_app(
    routes: Sequence[GuardedRoute], *, gate: Gate, render_error: RenderError
) -> Starlette:
    """Return an app that serves `routes` and answers every error through `render_error`."""

    async def on_error(request: Request, error: Exception) -> Response:
        answer = _from_starlette(error) if isinstance(error, HTTPException) else None
        answer = answer or to_api_error(error)
        body = render_error(request.url.path, answer)
        kind = LingeringResponse if answer.status == 413 else Response
        return json_response(body, status=answer.status, headers=answer.headers(), kind=kind)

    app = Starlette(
        routes=list(routes),
        exception_handlers={ApiError: on_error, HTTPException: on_error, Exception: on_error},
    )
    app.router.redirect_slashes = False
    app.state.gate = gate
    return app


def _from_starlette(error: HTTPException) -> ApiError:
    if error.status_code == 405:
        return ApiError(405, "This address does not take that method.", code="method_not_allowed")
    return ApiError(error.status_code, "Nothing is served at this address.", code="not_found")


def json_response(
    body: Any,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    kind: type[Response] = Response,
) -> Response:
    """Return `body` as JSON."""
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return kind(content, status, dict(headers or {}), media_type="application/json")


class LingeringResponse(Response):
    """An answer to a request whose body is not wanted, followed by the end of the connection.

    Most clients send all before they read. Closing on them at once resets the connection and
    loses the answer, so what still comes is thrown away for a while.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, let the client notice, close."""
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send(_part(bytes(self.body)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_LINGER_S = 10.0
_LINGER_IDLE_S = 1.0
_LINGER_BYTES = 64 << 20


async def _discard(receive: Receive) -> None:
    size, more = 0, True
    while more and size <= _LINGER_BYTES:
        message = await asyncio.wait_for(receive(), _LINGER_IDLE_S)
        size += len(message.get("body", b""))
        more = bool(message.get("more_body", False))


async def read_body(request: Request, *, limit: int) -> bytes:
    """Return the body.

    Raises:
        ApiError: it is, or says it is, over `limit` bytes; the rest is left unread. Or it did not
            come, or not to its end.
    """
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > limit:
        raise too_large(limit)
    try:
        async with asyncio.timeout(_BODY_LIMIT_S):
            return await _read_up_to(request, limit)
    except TimeoutError as error:
        raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The body was cut short.", code="body_cut") from error


_BODY_LIMIT_S = 60.0  # a request is counted, and a stop waits for it, while its body trickles in


async def _read_up_to(request: Request, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def too_large(limit: int) -> ApiError:
    """Return the answer to a body over `limit` bytes."""
    return ApiError(413, f"The body is over the limit of {limit} bytes.", code="request_too_large")


class EventStream:
    """Server-sent events as an ASGI answer; `events` is closed whatever happens.

    The first event is already there: until it is, a failure can still have a status of its own.
    """

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        self._first = first
        self._events = events

    @classmethod
    async def start(cls, events: AsyncGenerator[bytes, None]) -> "EventStream":
        """Wait for the first event; what that raises is the request's answer."""
        return cls(await anext(events), events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come, and an error event where they break off."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS})
            await send(_part(self._first))
            try:
                async for event in self._events:
                    await send(_part(event))
            except Exception as error:
                await send(_part(error_event(to_api_error(error))))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()


_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies of the nginx family hold a stream back without it
]


def _part(event: bytes) -> Message:
    return {"type": "http.response.body", "body": event, "more_body": True}


def error_event(error: ApiError) -> bytes:
    """Return an error as the last event of a stream."""
    return b"data: " + json.dumps(error.openai_body()).encode() + b"\n\n"


class Envelope:
    """What surrounds every request: its id, its count, and the end of it when its client goes.

    An answer whose client has gone is cancelled, and with it the sequence that was computing it;
    nothing else would stop that before its last token.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        on_open: Callable[[], None],
        on_close: Callable[[], None],
        tracing: Tracing,
    ) -> None:
        self.app = app
        self._on_open = on_open
        self._on_close = on_close
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_request_id(scope, send)
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        self._on_open()
        try:
            is_inference = scope["path"] in OPERATIONS or scope["path"].endswith("/infer")
            tracing = self._tracing if is_inference else NO_TRACING
            with tracing.request(f"POST {scope['path']}", Request(scope).headers) as span:
                send = _with_status(span, send)
                await _until_client_goes(self.app, scope, receive, send)
        finally:
            self._on_close()


def _with_status(span: Span, send: Send) -> Send:
    async def send_and_note(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.answered(message["status"])
        await send(message)

    return send_and_note


def _with_request_id(scope: Scope, send: Send) -> Send:
    given = Request(scope).headers.get("x-request-id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    scope["request_id"] = request_id

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], (b"x-request-id", request_id.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return send_with_id


async def _until_client_goes(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    body_read = asyncio.Event()

    async def receive_body() -> Message:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            body_read.set()
        return message

    async def gone() -> None:
        await body_read.wait()
        while (await receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.ensure_future(app(scope, receive_body, send))
    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watch.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait((answer,))
    if answer.cancelled():
        current_span.get().failed("client_gone", is_ours=False)
    else:
        answer.result()
