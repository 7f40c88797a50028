"""Every error a client can get, as one type; each protocol renders it in its own shape."""

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mizzen.runtime.engine.errors import (
    AdapterLoadError,
    AsleepError,
    DrainingError,
    EngineBusyError,
    EngineDeadError,
    GenerationFailedError,
    InvalidRequestError,
    PromptTooLongError,
    UnknownAdapterError,
)
from mizzen.runtime.errors import BadModelError, MizzenError


class ApiError(Exception):
    """An answer other than success, told with HTTP's status codes."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        """OpenAI's family of the error."""
        if self.status == 429:
            return "rate_limit_error"
        if self.status in (401, 403):
            return "authentication_error"
        if self.status >= 500:
            return "service_unavailable_error" if self.status == 503 else "server_error"
        return "invalid_request_error"

    def openai_body(self) -> dict[str, object]:
        """Return the error as OpenAI clients read it."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the error."""
        found: dict[str, str] = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, round(self.retry_after_s)))
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        return found


def not_ready(phase: str) -> ApiError:
    """Return the answer of a server that has no engine yet."""
    return ApiError(
        503,
        f"The model is not ready yet ({phase}). Try again shortly.",
        code="not_ready",
        retry_after_s=5,
    )


def unknown_model(name: str, known: list[str]) -> ApiError:
    """Return the answer to a name that nothing is served under."""
    listed = ", ".join(known)
    return ApiError(
        404,
        f"The model {name!r} does not exist here. Served now: {listed}.",
        code="model_not_found",
        param="model",
    )


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """Return a 400 that names the field to change."""
    return ApiError(400, message, param=param, code=code)


def to_api_error(error: Exception) -> ApiError:
    """Return what a client is told about an error of ours; anything else is a bare 500."""
    match error:
        case ApiError():
            return error
        case DrainingError():
            return ApiError(503, str(error), code="draining", retry_after_s=error.retry_after_s)
        case AsleepError():
            return ApiError(503, str(error), code="asleep", retry_after_s=error.retry_after_s)
        case EngineBusyError():
            return ApiError(429, str(error), code="busy", retry_after_s=error.retry_after_s)
        case PromptTooLongError():
            return invalid("messages", str(error), code="context_length_exceeded")
        case InvalidRequestError():
            return invalid(None, str(error))
        case UnknownAdapterError():
            return ApiError(404, str(error), code="model_not_found", param="model")
        case AdapterLoadError():
            return ApiError(400, str(error), code="adapter_load_failed")
        case BadModelError():
            return ApiError(400, str(error), code="weights_not_loaded")
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_dead", retry_after_s=30)
        case GenerationFailedError():
            return ApiError(500, str(error), code="generation_failed")
        case MizzenError():
            return ApiError(500, str(error), code="internal_error")
        case _:
            return ApiError(500, "The server failed on this request.", code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """Return a 400 from the most telling thing that pydantic found wrong."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=_how_telling)
    if first["type"] == "json_invalid":
        return invalid(None, f"The body is not valid JSON: {first['msg']}.", code="invalid_json")
    param = ".".join(_place(first)) or None
    if first["type"] == "extra_forbidden":
        return invalid(param, f"Unrecognized request argument supplied: {param}.")
    message = first["msg"].removeprefix("Value error, ")
    return invalid(param, f"{param}: {message}." if param else f"{message}.")


def _place(error: ErrorDetails) -> list[str]:
    # Parts like "list[TextPart]" or "str" tell which branch of a type of ours was tried.
    return [
        str(part)
        for part in error["loc"]
        if isinstance(part, int)
        or part.isdigit()
        or (part.isidentifier() and part not in ("str", "int"))
    ]


def _how_telling(error: ErrorDetails) -> tuple[bool, int, bool]:
    # A field of several types fails once for each; the branch that got furthest was meant: to the
    # end of a list, which is only then found to be too long.
    return error["type"] == "too_long", len(_place(error)), error["type"] != "string_type"
