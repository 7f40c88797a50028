"""What one client gets: an answer relayed as it comes, or an error it cannot take for an answer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

from aiohttp import web

from mizzen.runtime.gateway.attempt import Opened, Refusal, ReplicaLostError
from mizzen.runtime.gateway.connections import Connections
from mizzen.runtime.gateway.errors import AnswerCutError, AnswerTooLongError, GatewayError
from mizzen.runtime.gateway.headers import answer_headers

log = logging.getLogger(__name__)

_EVENT_STREAM = "text/event-stream"
_STREAM_HEADERS = {"Content-Type": _EVENT_STREAM, "Cache-Control": "no-cache"}
_DONE = b"data: [DONE]"
# The colon makes it a name: a token of this text, with its quotes, is a value.
_ERROR = re.compile(rb'"error"\s*:')
_Answer = TypeVar("_Answer", covariant=True)


class Replying(Protocol[_Answer]):
    """Who takes what becomes of a request: a client's connection, or a batch's line."""

    async def tell(self, text: str) -> None:
        """Hear how the waiting goes."""
        ...

    async def refuse(self, refusal: Refusal) -> _Answer:
        """Take a replica's error."""
        ...

    async def fail(self, error: GatewayError) -> _Answer:
        """Take an error of ours."""
        ...

    async def relay(
        self,
        opened: Opened,
        *,
        on_cut: Callable[[Exception], None],
        on_chunk: Callable[[bytes], None] | None = None,
    ) -> _Answer:
        """Take the answer; `on_cut` hears of one that ends before its end."""
        ...


class Reply:
    """The way back to one client. A stream that ends early ends with an error event."""

    def __init__(
        self, request: web.Request, *, wants_stream: bool, connections: Connections, most_bytes: int
    ) -> None:
        self._request = request
        self._wants_stream = wants_stream
        self._connections = connections
        self._most_bytes = most_bytes
        # The stream begun while the request waited: its status can no longer say that it failed.
        self._begun: web.StreamResponse | None = None

    async def tell(self, text: str) -> None:
        """Tell a client that streams how its waiting goes, as a comment its parser skips."""
        if not self._wants_stream:
            return
        if self._begun is None:
            self._begun = web.StreamResponse(headers=_STREAM_HEADERS)
            await self._begun.prepare(self._request)
        await self._write(self._begun, f": {text}\n\n".encode())

    async def refuse(self, refusal: Refusal) -> web.StreamResponse:
        """Answer with the replica's error."""
        if self._begun is not None:
            return await self._end_with(self._begun, refusal.body)
        return web.Response(status=refusal.status, headers=refusal.headers, body=refusal.body)

    async def fail(self, error: GatewayError) -> web.StreamResponse:
        """Answer with an error of ours."""
        if self._begun is not None:
            return await self._end_with(self._begun, json.dumps(error.document()).encode())
        return error.response()

    async def _end_with(self, stream: web.StreamResponse, event: bytes) -> web.StreamResponse:
        with suppress(ConnectionError):
            await self._write(stream, b"data: " + event + b"\n\n")
            await self._end(stream)
        return stream

    async def _write(self, stream: web.StreamResponse, piece: bytes) -> None:
        with self._connections.writing(self._request):
            await stream.write(piece)

    async def _end(self, stream: web.StreamResponse) -> None:
        with self._connections.writing(self._request):
            await stream.write_eof()

    async def relay(
        self,
        opened: Opened,
        *,
        on_cut: Callable[[Exception], None],
        on_chunk: Callable[[bytes], None] | None = None,
    ) -> web.StreamResponse:
        """Pass the replica's answer on; `on_cut` hears of it when it ends before its end.

        Raises:
            AnswerTooLongError: it says so itself, and nothing of it was passed on.
        """
        upstream = opened.response
        if (opened.length_bytes or 0) > self._most_bytes:
            opened.close()
            raise AnswerTooLongError(self._most_bytes)
        answer = self._begun or web.StreamResponse(
            status=upstream.status, headers=answer_headers(upstream.headers)
        )
        if opened.length_bytes is not None and self._begun is None:
            answer.content_length = opened.length_bytes
        sent_bytes = 0
        try:
            # aiohttp reads no more than two buffers ahead, and `write` waits for a slow client:
            # that is the whole of the flow control.
            chunk = tail = opened.first_chunk
            if self._begun is None:
                await answer.prepare(self._request)
            while chunk:
                if (sent_bytes := sent_bytes + len(chunk)) > self._most_bytes:
                    raise AnswerTooLongError(self._most_bytes)
                if on_chunk is not None:
                    on_chunk(chunk)
                await self._write(answer, chunk)
                tail = chunk if len(chunk) >= len(_DONE) else tail + chunk
                chunk = await opened.next_chunk()
            if _is_stream(answer) and not _is_whole(tail):
                raise ReplicaLostError("the stream ended without [DONE]")
            if _is_stream(answer) and not tail.rstrip().endswith(_DONE):
                on_cut(ReplicaLostError("the replica ended the stream with an error"))
            await self._end(answer)
        except (ReplicaLostError, AnswerTooLongError) as error:
            on_cut(error)
            await self._cut(answer, error)
        except ConnectionError:
            log.debug("a client went away in the middle of its answer")
        finally:
            # Also when this task is cancelled because the client went away: the replica notices
            # the closed connection and stops generating.
            opened.close()
        return answer

    async def _cut(self, answer: web.StreamResponse, error: Exception) -> None:
        """End an answer early so that nobody takes it for a complete one."""
        if _is_stream(answer):
            told = error if isinstance(error, GatewayError) else AnswerCutError()
            with suppress(ConnectionError):
                await self._write(answer, b"\n\n")
            await self._end_with(answer, json.dumps(told.document()).encode())
        elif self._request.transport is not None:
            # No end of the body was sent: the client's HTTP library reports it as incomplete.
            self._request.transport.close()


def _is_stream(answer: web.StreamResponse) -> bool:
    return answer.headers.get("Content-Type", "").startswith(_EVENT_STREAM)


def _is_whole(tail: bytes) -> bool:
    """Whether a stream's last bytes are an end its client understands: [DONE], or an error."""
    return tail.rstrip().endswith(_DONE) or _ERROR.search(tail) is not None
