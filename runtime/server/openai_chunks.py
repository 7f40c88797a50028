"""The bytes of a stream. Nothing but the new text is built per token: the rest is a template."""

import json
from collections.abc import Mapping

Json = Mapping[str, object]


class ChunkWriter:
    """Writes the events of one stream.

    A chunk is `head + index + middle + payload + tail`, of which only `payload` changes.
    """

    def __init__(
        self, *, answer_id: str, kind: str, created: int, model: str, include_usage: bool
    ) -> None:
        self._envelope = {"id": answer_id, "object": kind, "created": created, "model": model}
        opened = json.dumps(self._envelope, separators=(",", ":"))[:-1]
        self._head = f'data: {opened},"choices":[{{"index":'
        # With include_usage every chunk carries the field, null until the last.
        self._tail = (',"usage":null' if include_usage else "") + "}\n\n"

    def text(self, index: int, payload: str) -> bytes:
        """Return a chunk that only adds text; `payload` is the choice's own JSON fields."""
        return (
            f'{self._head}{index},{payload},"logprobs":null,"finish_reason":null}}]{self._tail}'
        ).encode()

    def choice(self, index: int, fields: Json) -> bytes:
        """Return a chunk with whatever fields the choice has."""
        inner = json.dumps(fields, separators=(",", ":"))[1:-1]
        return f"{self._head}{index},{inner}}}]{self._tail}".encode()

    def usage(self, usage: Json) -> bytes:
        """Return the last chunk, which has no choice."""
        body = {**self._envelope, "choices": [], "usage": usage}
        return f"data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def quoted(text: str) -> str:
    """Return text as a JSON string."""
    return json.dumps(text)
