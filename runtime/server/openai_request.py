"""A call of OpenAI's: its route, and its bytes as a checked model."""

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access
from mizzen.runtime.server.errors import from_validation
from mizzen.runtime.server.routes import GuardedRoute, read_body
from mizzen.runtime.server.service import Service
from mizzen.runtime.tracing import OPERATIONS, current_span

Asked = TypeVar("Asked", bound=BaseModel)


def post_route(
    path: str,
    call: Callable[[Service, Asked], Awaitable[ASGIApp]],
    kind: type[Asked],
    service: Service,
) -> GuardedRoute:
    """Return the route of a call that takes a `kind`."""
    operation = OPERATIONS.get(path)

    @wraps(call)
    async def endpoint(request: Request) -> ASGIApp:
        body = await read_body(request, limit=service.config.max_body_bytes)
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise from_validation(error) from error
        if operation is not None:
            current_span.get().name(operation, asked.model)
        return await call(service, asked)

    return GuardedRoute("POST", path, endpoint, Access.USER, body=kind)
