"""One request sent to one replica, up to the first byte of its answer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    ServerTimeoutError,
)
from multidict import CIMultiDict

from mizzen.runtime.gateway.errors import error_body
from mizzen.runtime.gateway.headers import answer_headers

_ERROR_BODY_BYTES = 256 * 1024
_LONG_BODY_BYTES = 1 << 20
_JSON = "application/json"
_EVENT_STREAM = "text/event-stream"


class FailureKind(Enum):
    """Why a replica did not answer, and so whether another may be asked."""

    UNREACHABLE = "unreachable"  # no connection: nobody has seen the request
    LOST = "lost"  # the connection broke before an answer: it may have been worked on
    DRAINING = "draining"  # 503: refused unread
    BUSY = "busy"  # 429: refused unread


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error answer, read whole."""

    status: int
    headers: CIMultiDict[str]
    body: bytes


class AttemptError(Exception):
    """This replica will not answer the request; another one may."""

    def __init__(self, kind: FailureKind, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.refusal = refusal


class ReplicaTimeoutError(Exception):
    """The replica took the request and said nothing for the whole read timeout."""


class ReplicaLostError(Exception):
    """The replica was lost after the first byte: too late for another one."""


@dataclass(slots=True)
class Opened:
    """An answer whose first byte is here; the rest is still in the connection."""

    response: ClientResponse
    first_chunk: bytes

    @property
    def length_bytes(self) -> int | None:
        """How long the answer says it is, if it does."""
        return self.response.content_length

    async def next_chunk(self) -> bytes:
        """Return more of the answer as it comes, nothing at its end.

        Raises:
            ReplicaLostError: the connection broke or stayed silent before the end.
        """
        try:
            return await self.response.content.readany()
        except (ClientError, OSError) as error:
            raise ReplicaLostError(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Give the connection back; drop it where the replica is still generating, to stop that."""
        if self.response.content.at_eof():
            self.response.release()
        else:
            self.response.close()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What is sent, the same to every replica tried."""

    path: str
    headers: CIMultiDict[str]
    body: bytes
    connect_timeout_s: float
    read_timeout_s: float


async def open_answer(session: ClientSession, url: str, outgoing: Outgoing) -> Opened | Refusal:
    """Send the request to the replica at `url` and wait for the first byte of its answer.

    Raises:
        AttemptError: another replica may be asked.
        ReplicaTimeoutError: the replica is still silent after the read timeout.
    """
    try:
        return await _open(session, url, outgoing)
    except (ClientConnectorError, ConnectionTimeoutError) as error:
        raise AttemptError(FailureKind.UNREACHABLE, str(error)) from error
    except ServerTimeoutError as error:
        raise ReplicaTimeoutError(str(error)) from error
    except (ClientError, OSError) as error:
        raise AttemptError(FailureKind.LOST, str(error) or type(error).__name__) from error


async def _open(session: ClientSession, url: str, outgoing: Outgoing) -> Opened | Refusal:
    timeout = ClientTimeout(
        total=None, sock_connect=outgoing.connect_timeout_s, sock_read=outgoing.read_timeout_s
    )
    body = outgoing.body
    response = await session.post(
        url + outgoing.path,
        # A long body goes out in pieces, so that other streams are not held up by it.
        data=body if len(body) < _LONG_BODY_BYTES else io.BytesIO(body),
        headers=outgoing.headers,
        timeout=timeout,
        allow_redirects=False,
    )
    try:
        if response.status < 400:
            first = await response.content.readany()
            if not first and response.content_type == _EVENT_STREAM:
                raise AttemptError(FailureKind.LOST, "an empty stream")
            return Opened(response, first)
        refusal = await _read_refusal(response)
    except BaseException:
        # Cancelled too: the client is gone, and its answer must not be generated to the end.
        response.close()
        raise
    if response.status == 503:
        raise AttemptError(FailureKind.DRAINING, "503", refusal)
    if response.status == 429:
        raise AttemptError(FailureKind.BUSY, "429", refusal)
    return refusal


async def _read_refusal(response: ClientResponse) -> Refusal:
    """Read an error answer, put in OpenAI's shape where its clients would not understand it."""
    body = bytearray()
    while len(body) < _ERROR_BODY_BYTES and (chunk := await response.content.readany()):
        body += chunk
    response.release()
    headers = answer_headers(response.headers)
    with suppress(ValueError):
        document = json.loads(body)
        if isinstance(document, dict) and isinstance(document.get("error"), dict):
            headers.pop("Content-Length", None)
            return Refusal(response.status, headers, bytes(body))
    shaped = json.dumps(_shaped_error(response.status, response.url.path, body)).encode()
    for name in ("Content-Length", "Content-Encoding", "Content-Type"):
        headers.popall(name, None)
    headers["Content-Type"] = _JSON
    return Refusal(response.status, headers, shaped)


def _shaped_error(status: int, path: str, body: bytes | bytearray) -> Mapping[str, object]:
    if status in (404, 405, 501):
        message = f"This model's runtime does not offer {path}."
        return error_body(message, "invalid_request_error", code="unsupported_endpoint")
    text = " ".join(body[:300].decode(errors="replace").split())
    kind = "invalid_request_error" if status < 500 else "server_error"
    return error_body(f"The replica answered {status}: {text or 'no reason given'}", kind)
