"""Errors the gateway answers with, in the shape OpenAI's clients know."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

from aiohttp import web

_MODELS_SHOWN = 20


def error_body(
    message: str, kind: str, *, code: str | None = None, param: str | None = None
) -> dict[str, object]:
    """Return OpenAI's error document."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class GatewayError(Exception):
    """Base of the errors a client sees; the outermost middleware turns one into an answer."""

    status: ClassVar[int] = 500
    kind: str = "server_error"
    code: ClassVar[str | None] = None
    param: ClassVar[str | None] = None

    def headers(self) -> Mapping[str, str]:
        """Headers that go with this error."""
        return {}

    def document(self) -> dict[str, object]:
        """Return the error as OpenAI's clients know it."""
        return error_body(str(self), self.kind, code=self.code, param=self.param)

    def response(self) -> web.Response:
        """Return the answer for this error."""
        return web.Response(
            status=self.status,
            body=json.dumps(self.document()).encode(),
            content_type="application/json",
            headers=self.headers(),
        )


class BadBodyError(GatewayError):
    """The request's body cannot be understood; the message names what is wrong."""

    status = 400
    kind = "invalid_request_error"


class BadModelFieldError(BadBodyError):
    """The body names no model."""

    param = "model"


class BodyTooLargeError(GatewayError):
    """The body is over the limit; it was not read to its end."""

    status = 413
    kind = "invalid_request_error"
    code = "request_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The request body is larger than {limit_bytes // 2**20} MiB. "
            "Send a shorter prompt, or raise gateway.maxBodyMiB in the chart."
        )


class SlowBodyError(GatewayError):
    """The client did not send its body in time."""

    status = 408
    kind = "invalid_request_error"
    code = "request_timeout"


class BadKeyError(GatewayError):
    """The API key is missing or unknown."""

    status = 401
    kind = "authentication_error"
    code = "invalid_api_key"

    def headers(self) -> Mapping[str, str]:
        """Say which scheme is asked for."""
        return {"WWW-Authenticate": "Bearer"}


class RateLimitedError(GatewayError):
    """An API key has used what it may."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, what: str, retry_after_s: float) -> None:
        super().__init__(f"{message} Try again in {math.ceil(retry_after_s)} seconds.")
        # OpenAI names here what was exceeded.
        self.kind = what
        self.retry_after_s = max(1, math.ceil(retry_after_s))

    def headers(self) -> Mapping[str, str]:
        """Say when to come back."""
        return {"Retry-After": str(self.retry_after_s)}


class UnknownModelError(GatewayError):
    """No deployment serves this model name."""

    status = 404
    kind = "invalid_request_error"
    code = "model_not_found"
    param = "model"

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        shown = ", ".join(names[:_MODELS_SHOWN])
        if len(names) > _MODELS_SHOWN:
            shown += f" and {len(names) - _MODELS_SHOWN} more (GET /v1/models)"
        listed = f"Models served here: {shown}." if names else "No model is served here yet."
        super().__init__(f"The model {name[:200]!r} does not exist. {listed}")


class NoReplicaError(GatewayError):
    """The model is known, and no replica can take the request now."""

    status = 503
    kind = "service_unavailable"
    code = "model_not_ready"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def headers(self) -> Mapping[str, str]:
        """Say when to come back."""
        return {"Retry-After": str(self.retry_after_s)}


class BusyError(GatewayError):
    """Every replica has as many requests as it takes."""

    status = 429
    kind = "rate_limit_error"
    code = "model_busy"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def headers(self) -> Mapping[str, str]:
        """Say when to come back."""
        return {"Retry-After": str(self.retry_after_s)}


class AnswerCutError(GatewayError):
    """The replica was lost after the first byte."""

    code = "replica_lost"

    def __init__(self) -> None:
        super().__init__(
            "The replica was lost in the middle of this answer; send the request again."
        )


class AnswerTooLongError(GatewayError):
    """The answer is over the limit; it was not passed on to its end."""

    status = 502
    code = "response_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The answer is longer than {limit_bytes // 2**20} MiB; ask for fewer tokens, or "
            "raise gateway.maxAnswerMiB in the chart."
        )


class ReplicaSilentError(GatewayError):
    """A replica took the request and then said nothing for too long."""

    status = 504
    kind = "server_error"
    code = "replica_timeout"
