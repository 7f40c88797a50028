"""A line's answer, read whole: it goes to a file, not to a connection."""

from __future__ import annotations

import json
from collections.abc import Callable

from mizzen.runtime.gateway.attempt import Opened, Refusal, ReplicaLostError
from mizzen.runtime.gateway.batches.lines import LineAnswer
from mizzen.runtime.gateway.errors import AnswerCutError, AnswerTooLongError, GatewayError


class Collected:
    """Takes what a client's connection would get."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes

    async def tell(self, text: str) -> None:
        """Nobody listens."""

    async def refuse(self, refusal: Refusal) -> LineAnswer:
        """Take a replica's error."""
        retry_after = refusal.headers.get("Retry-After")
        return LineAnswer(refusal.status, refusal.body, _seconds(retry_after))

    async def fail(self, error: GatewayError) -> LineAnswer:
        """Take an error of ours."""
        return failed(error)

    async def relay(
        self,
        opened: Opened,
        *,
        on_cut: Callable[[Exception], None],
        on_chunk: Callable[[bytes], None] | None = None,
    ) -> LineAnswer:
        """Take the answer; `on_cut` hears of one that ends before its end."""
        body = bytearray()
        chunk = opened.first_chunk
        try:
            while chunk:
                body += chunk
                if len(body) > self._most_bytes:
                    raise AnswerTooLongError(self._most_bytes)
                if on_chunk is not None:
                    on_chunk(chunk)
                chunk = await opened.next_chunk()
        except ReplicaLostError as error:
            on_cut(error)
            return failed(AnswerCutError())
        finally:
            opened.close()
        return LineAnswer(opened.response.status, bytes(body))


def failed(error: GatewayError) -> LineAnswer:
    """Return an error of ours as a line's answer."""
    body = json.dumps(error.document()).encode()
    return LineAnswer(error.status, body, _seconds(error.headers().get("Retry-After")))


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else float(header)
    except ValueError:
        return None
