"""An answer on its way through the output guardrails: whole, or cut off where one is hit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from mizzen.runtime.gateway.attempt import Opened, Refusal, ReplicaLostError
from mizzen.runtime.gateway.errors import AnswerCutError, AnswerTooLongError, GatewayError
from mizzen.runtime.gateway.guardrails import Guardrail
from mizzen.runtime.gateway.reply import Replying
from mizzen.runtime.gateway.texts import Place, texts_of

_Answer = TypeVar("_Answer")
_EVENT_STREAM = "text/event-stream"
# How far back a pattern sees in a stream.
_TAIL_CHARS = 4096
_END = b"data: [DONE]\n\n"


class GuardedReply(Generic[_Answer]):
    """Passes everything on to a reply, but answers only as the guardrails let them through."""

    def __init__(
        self,
        reply: Replying[_Answer],
        rails: Sequence[Guardrail],
        *,
        most_bytes: int,
        on_hit: Callable[[Guardrail], None],
    ) -> None:
        self._reply = reply
        self._rails = rails
        self._most_bytes = most_bytes
        self._on_hit = on_hit

    async def tell(self, text: str) -> None:
        """Hear how the waiting goes."""
        await self._reply.tell(text)

    async def refuse(self, refusal: Refusal) -> _Answer:
        """Take a replica's error."""
        return await self._reply.refuse(refusal)

    async def fail(self, error: GatewayError) -> _Answer:
        """Take an error of ours."""
        return await self._reply.fail(error)

    async def relay(
        self,
        opened: Opened,
        *,
        on_cut: Callable[[Exception], None],
        on_chunk: Callable[[bytes], None] | None = None,
    ) -> _Answer:
        """Take the answer.

        Raises:
            AnswerCutError, AnswerTooLongError: before anything of it was passed on.
        """
        if opened.response.content_type == _EVENT_STREAM:
            guarded = await self._begun(opened, on_cut)
        else:
            guarded = await self._whole(opened, on_cut)
        return await self._reply.relay(guarded, on_cut=on_cut, on_chunk=on_chunk)

    async def _begun(self, opened: Opened, on_cut: Callable[[Exception], None]) -> Opened:
        """Return a stream once something of it may pass."""
        try:
            guarded = GuardedStream(opened, Watch(self._rails, self._on_hit))
            guarded.first_chunk = guarded.first_chunk or await guarded.next_chunk()
        except ReplicaLostError as error:
            opened.close()
            on_cut(error)
            raise AnswerCutError() from None
        except BaseException:
            opened.close()
            raise
        return guarded

    async def _whole(self, opened: Opened, on_cut: Callable[[Exception], None]) -> Opened:
        body, chunk = bytearray(), opened.first_chunk
        try:
            while chunk:
                body += chunk
                if len(body) > self._most_bytes:
                    raise AnswerTooLongError(self._most_bytes)
                chunk = await opened.next_chunk()
        except ReplicaLostError as error:
            on_cut(error)
            raise AnswerCutError() from None
        finally:
            opened.close()
        return Whole(opened.response, cut_document(bytes(body), self._rails, self._on_hit))


class Whole(Opened):
    """An answer that is here in full."""

    @property
    def length_bytes(self) -> int:
        """How long it is, however long it was."""
        return len(self.first_chunk)

    async def next_chunk(self) -> bytes:
        """There is no more."""
        return b""


class GuardedStream(Opened):
    """A stream that ends as its guardrails say; the replica then stops generating."""

    def __init__(self, opened: Opened, watch: Watch) -> None:
        super().__init__(opened.response, opened.first_chunk)
        self._opened = opened
        self._watch = watch
        self._rest = b""
        self._is_over = False
        self.first_chunk = self._passed(opened.first_chunk)

    async def next_chunk(self) -> bytes:
        """Return the next whole events that may pass, nothing at the end."""
        while not self._is_over:
            chunk = await self._opened.next_chunk()
            if not chunk:
                self._is_over = True
                # A client may take an event that nobody ended for one all the same.
                return self._passed(b"\n\n") if self._rest else b""
            if passed := self._passed(chunk):
                return passed
        return b""

    def _passed(self, chunk: bytes) -> bytes:
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        passed = bytearray()
        for event in events:
            if (ending := self._watch.ending(event)) is not None:
                self._is_over = True
                return bytes(passed + ending)
            passed += event + b"\n\n"
        return bytes(passed)


class Watch:
    """What each choice of a stream has said so far, as far as patterns see."""

    def __init__(self, rails: Sequence[Guardrail], on_hit: Callable[[Guardrail], None]) -> None:
        self._rails = rails
        self._on_hit = on_hit
        self._tails: dict[int, str] = {}
        self._sizes: dict[int, int] = {}

    def ending(self, event: bytes) -> bytes | None:
        """Return what the stream ends with instead of this event, None where it may pass."""
        document = _document(event.removeprefix(b"data:"))
        for choice in _choices(document):
            index = choice.get("index", 0)
            said = _said(choice, "delta")
            seen = self._tails.get(index, "") + said
            self._tails[index] = seen[-_TAIL_CHARS:]
            self._sizes[index] = self._sizes.get(index, 0) + len(said)
            for rail in self._rails:
                too_long = rail.max_chars is not None and self._sizes[index] > rail.max_chars
                if too_long or rail.first_hit(seen) is not None:
                    self._on_hit(rail)
                    return self._end(document)
        return None

    def _end(self, document: dict[str, Any]) -> bytes:
        is_chat = any("delta" in choice for choice in _choices(document))
        nothing: dict[str, object] = {"delta": {}} if is_chat else {"text": ""}
        ended = [
            {"index": index, **nothing, "logprobs": None, "finish_reason": "content_filter"}
            for index in sorted(self._tails)
        ]
        return b"data: " + json.dumps({**document, "choices": ended}).encode() + b"\n\n" + _END


def cut_document(
    body: bytes, rails: Sequence[Guardrail], on_hit: Callable[[Guardrail], None]
) -> bytes:
    """Return an answer with each choice cut off where a guardrail is hit."""
    document = _document(body)
    is_cut = False
    for choice in _choices(document):
        for rail in rails:
            kept = _kept(choice, rail)
            if kept is None:
                continue
            on_hit(rail)
            is_cut = True
            said = {"message": {"role": "assistant", "content": kept}, "text": kept}
            choice |= {name: said[name] for name in said if name in choice}
            choice |= {"logprobs": None, "finish_reason": "content_filter"}
    return json.dumps(document).encode() if is_cut else body


def _kept(choice: dict[str, Any], rail: Guardrail) -> str | None:
    """Return what a guardrail leaves of a choice, None where it leaves it alone."""
    whole = _said(choice, "message")
    is_hit = rail.first_hit(whole) is not None
    if not is_hit and (rail.max_chars is None or len(whole) <= rail.max_chars):
        return None
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        return ""
    # What is hit may be no part of the text, but of a tool's arguments beside it.
    end = rail.first_hit(text) if is_hit else len(text)
    return "" if end is None else text[:end][: rail.max_chars]


def _said(choice: dict[str, Any], name: str) -> str:
    """Return all the text of a choice, which chats have under `name`."""
    return "".join(texts_of([choice.get(name), choice.get("text")], Place.ANSWER))


def _document(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _choices(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            yield choice
