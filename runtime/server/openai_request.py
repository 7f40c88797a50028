"""Bytes of an OpenAI request become a checked model of it."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from mizzen.runtime.server.errors import from_validation
from mizzen.runtime.server.routes import read_body
from mizzen.runtime.server.service import Service

Asked = TypeVar("Asked", bound=BaseModel)


async def parse(service: Service, request: Request, kind: type[Asked]) -> Asked:
    """Return the request's body as `kind`.

    Raises:
        ApiError: it is too large, not JSON, or a field of it is wrong.
    """
    body = await read_body(request, limit=service.config.max_body_bytes)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from error
