"""Reading a request's body: bounded in size and time, understood only as far as routing needs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from mizzen.runtime.gateway.errors import (
    BadBodyError,
    BadModelFieldError,
    BodyTooLargeError,
    SlowBodyError,
)

# What scores are asked for with.
SCORES = ("prompt_logprobs", "prompt_samples")


@dataclass(frozen=True, slots=True)
class Body:
    """A request's JSON body and the model it asks for."""

    raw: bytes
    document: dict[str, object]
    model: str

    @property
    def is_for_idle_moments(self) -> bool:
        """Whether it asks for what a replica does only while nobody asks for text: scores."""
        return any(self.document.get(name) is not None for name in SCORES)

    def for_model(self, name: str, *, key_priority: int | None) -> bytes:
        """Return the body to send to a replica that knows the model as `name`.

        `key_priority` is None where the runtime has no priorities for what is asked.
        """
        changes: dict[str, object] = {}
        if name != self.model:
            changes["model"] = name
        if key_priority is not None and (key_priority or "priority" in self.document):
            changes["priority"] = engine_priority(self.document.get("priority"), key_priority)
        return json.dumps({**self.document, **changes}).encode() if changes else self.raw


def engine_priority(given: object, key_priority: int) -> int:
    """Return a request's priority in the runtime, where lower runs first.

    A client may let others go first, but not go before what its key may.
    """
    own = -key_priority
    # Of what is no integer, such as "-5", a runtime is told nothing: it may be of another version.
    return max(own, given) if type(given) is int else own


async def read_body(request: web.Request, *, limit_bytes: int, timeout_s: float) -> Body:
    """Read and check the body.

    Raises:
        BodyTooLargeError, SlowBodyError, BadBodyError: with what is wrong.
    """
    return parse_body(await _read(request, limit_bytes=limit_bytes, timeout_s=timeout_s))


async def read_document(
    request: web.Request, *, limit_bytes: int, timeout_s: float
) -> dict[str, object]:
    """Read a body that is a JSON object and is not for a model.

    Raises:
        BodyTooLargeError, SlowBodyError, BadBodyError: with what is wrong.
    """
    return parse_document(await _read(request, limit_bytes=limit_bytes, timeout_s=timeout_s))


def parse_document(raw: bytes) -> dict[str, object]:
    """Check that the body is a JSON object.

    Raises:
        BadBodyError: with what is wrong and where.
    """
    if not raw.strip():
        raise BadBodyError("The request has no body; send a JSON object.")
    try:
        document = json.loads(raw)
    except json.JSONDecodeError as error:
        raise BadBodyError(
            f"The request body is not valid JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}."
        ) from None
    except UnicodeDecodeError as error:
        raise BadBodyError(f"The request body is not valid UTF-8 at byte {error.start}.") from None
    except (RecursionError, ValueError) as error:
        raise BadBodyError(
            f"The request body cannot be read as JSON ({type(error).__name__})."
        ) from None
    if not isinstance(document, dict):
        raise BadBodyError(f"The request body is {_kind(document)}; send a JSON object.")
    return document


def parse_body(raw: bytes) -> Body:
    """Check that the body is a JSON object that names a model.

    Raises:
        BadBodyError: with what is wrong and where.
    """
    document = parse_document(raw)
    model = document.get("model")
    if model is None:
        raise BadModelFieldError("The field 'model' is missing; GET /v1/models lists the models.")
    if not isinstance(model, str) or not model:
        raise BadModelFieldError(
            f"The field 'model' is {_kind(model)}; send the model's name as a string."
        )
    return Body(raw, document, model)


def refuse_large(request: web.Request, limit_bytes: int) -> None:
    """Refuse a body whose stated length is over the limit.

    Raises:
        BodyTooLargeError: before a byte of it is read.
    """
    if (request.content_length or 0) > limit_bytes:
        raise BodyTooLargeError(limit_bytes)


async def _read(request: web.Request, *, limit_bytes: int, timeout_s: float) -> bytes:
    refuse_large(request, limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while chunk := await request.content.readany():
                body += chunk
                if len(body) > limit_bytes:
                    raise BodyTooLargeError(limit_bytes)
    except TimeoutError:
        raise SlowBodyError(
            f"The request body did not arrive within {timeout_s:g} seconds."
        ) from None
    except (ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
        raise BadBodyError(f"The request body is broken: {error}") from None
    return bytes(body)


_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: object) -> str:
    return "an empty string" if value == "" else _KINDS[type(value)]
