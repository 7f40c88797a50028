"""The lines of a batch: one request each going in, one answer each coming out. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mizzen.runtime.gateway.batches.records import new_id
from mizzen.runtime.gateway.body import parse_body
from mizzen.runtime.gateway.errors import BadBodyError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_MOST_ERRORS = 20


class LineError(ValueError):
    """A line that cannot be run: OpenAI's code for it, and what to change."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class Line:
    """One request."""

    custom_id: str
    body: Mapping[str, object]

    def raw_body(self) -> bytes:
        """Return the body as a client would have sent it."""
        return json.dumps(self.body).encode()


def parse_line(text: bytes, *, endpoint: str) -> Line:
    """Read a line of an input file.

    Raises:
        LineError: it is none; it says what is wrong.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise LineError("invalid_json_line", "This line is not valid JSON.") from None
    if not isinstance(document, dict):
        raise LineError("invalid_json_line", "This line is not a JSON object.")
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        message = "Give each line a 'custom_id': a string of 1 to 512 characters."
        raise LineError("missing_required_parameter", message, "custom_id")
    if document.get("method") != "POST":
        raise LineError("invalid_method", "The field 'method' must be \"POST\".", "method")
    if document.get("url") != endpoint:
        message = f"The field 'url' must be the batch's endpoint, \"{endpoint}\"."
        raise LineError("mismatched_endpoint", message, "url")
    try:
        body = parse_body(json.dumps(document.get("body")).encode()).document
    except RecursionError:
        raise LineError("invalid_request", "The field 'body' is nested too deeply.") from None
    except BadBodyError as error:
        raise LineError("invalid_request", f"The field 'body': {error}", "body") from None
    if body.get("stream"):
        raise LineError("invalid_request", "A batch does not stream: leave out 'stream'.", "body")
    return Line(custom_id, body)


@dataclass(frozen=True, slots=True)
class Checked:
    """What an input file holds: so many requests, or what keeps it from being run."""

    total: int
    errors: tuple[Mapping[str, object], ...]


def check_lines(
    lines: Iterable[bytes], *, endpoint: str, most_lines: int, most_bytes: int
) -> Checked:
    """Look at every line before the first one is run."""
    errors: list[Mapping[str, object]] = []
    seen: set[str] = set()
    for number, text in enumerate(lines, start=1):
        try:
            if not text.strip():
                continue
            if len(seen) == most_lines:
                message = f"A batch may have {most_lines} lines; make several of it."
                raise LineError("too_many_requests", message)
            if len(text) > most_bytes:
                message = f"A line may have {most_bytes // 2**20} MiB (gateway.maxBodyMiB)."
                raise LineError("request_too_large", message)
            line = parse_line(text, endpoint=endpoint)
            if line.custom_id in seen:
                message = f"The custom_id {line.custom_id!r} is used twice."
                raise LineError("duplicate_custom_id", message, "custom_id")
            seen.add(line.custom_id)
        except LineError as error:
            errors.append(line_error(error, number))
            if len(errors) == _MOST_ERRORS or error.code == "too_many_requests":
                break
    if not seen and not errors:
        errors.append(line_error(LineError("empty_file", "The input file has no line."), None))
    return Checked(len(seen), tuple(errors))


def line_error(error: LineError, number: int | None) -> Mapping[str, object]:
    """Return a batch's error as OpenAI's clients know it."""
    return {"code": error.code, "message": str(error), "param": error.param, "line": number}


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """What became of one request."""

    status: int
    body: bytes
    retry_after_s: float | None = None

    @property
    def is_good(self) -> bool:
        """Whether it belongs in the output file, not in the error file."""
        return self.status < 400

    def written(self, custom_id: str, request_id: str) -> bytes:
        """Return its line in a file."""
        try:
            body = json.loads(self.body)
        except ValueError:
            body = self.body.decode(errors="replace")
        response = {"status_code": self.status, "request_id": request_id, "body": body}
        return _written(custom_id, response=response, error=None)


def unanswered(custom_id: str) -> bytes:
    """Return the line in the error file of a request that its time ran out for."""
    message = "This request could not be executed before the completion window expired."
    return _written(custom_id, response=None, error={"code": "batch_expired", "message": message})


def _written(custom_id: str, *, response: object, error: object) -> bytes:
    line = {
        "id": new_id("batch_req_"),
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(line).encode() + b"\n"
