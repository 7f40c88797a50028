"""A port described in OpenAPI's words, read from its routes and the models of their bodies.

Nothing is written twice: a route that is added, or a field that changes, is in it.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any

from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access
from mizzen.runtime.server.oip_models import server_metadata
from mizzen.runtime.server.routes import GuardedRoute, json_response

PATH = "/openapi.json"

Json = dict[str, Any]

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_SCHEMAS = "#/components/schemas/{model}"
_KEY_MEANING = {
    Access.OPEN: "Needs no key.",
    Access.USER: "Needs an API key where the server has some.",
    Access.ADMIN: "Needs the admin token; where the server has none, loopback may call.",
}


def description_route(routes: Sequence[GuardedRoute]) -> GuardedRoute:
    """Return the route that describes `routes` and itself."""

    @cache
    def document() -> Json:
        return describe([*routes, own])

    async def endpoint(request: Request) -> ASGIApp:
        """Describe this port in OpenAPI's words."""
        return json_response(document())

    own = GuardedRoute("GET", PATH, endpoint, Access.USER)
    return own


def describe(routes: Iterable[GuardedRoute]) -> Json:
    """Return the OpenAPI 3.1 document of `routes`."""
    paths: dict[str, Json] = {}
    models = {}
    for route in routes:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD"}):
            paths.setdefault(path, {})[method.lower()] = _operation(route, method, path)
        if route.body is not None:
            models[route.body, "validation"] = None
    _, schemas = models_json_schema(list(models), ref_template=_SCHEMAS)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Mizzen", "version": server_metadata()["version"]},
        "paths": paths,
        "components": {
            "schemas": schemas.get("$defs", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: GuardedRoute, method: str, path: str) -> Json:
    operation: Json = {
        "operationId": "_".join([method.lower(), *re.findall(r"\w+", path)]),
        "summary": _summary(route),
        "description": _KEY_MEANING[route.access],
        "security": [] if route.access is Access.OPEN else [{"key": []}],
        "responses": {
            "2XX": {"description": "The answer."},
            "default": {"description": "An error; its text says what to change."},
        },
    }
    if names := _PARAMETER.findall(route.path):
        text = {"type": "string"}
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": text} for name in names
        ]
    if route.body is not None:
        schema = {"$ref": _SCHEMAS.format(model=route.body.__name__)}
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


def _summary(route: GuardedRoute) -> str:
    call = route.endpoint.func if isinstance(route.endpoint, partial) else route.endpoint
    return (inspect.getdoc(call) or "").partition("\n")[0]
