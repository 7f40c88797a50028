"""GET /v1/models: the base model and its adapters."""

from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.server.routes import json_response
from mizzen.runtime.server.service import Service


async def list_models(service: Service, request: Request) -> ASGIApp:
    """List every name that can be asked for."""
    names = service.model_names()
    return json_response({"object": "list", "data": [_model(service, name) for name in names]})


async def get_model(service: Service, request: Request) -> ASGIApp:
    """Describe one name."""
    name = request.path_params["model"]
    service.resolve(name)
    return json_response(_model(service, name))


def _model(service: Service, name: str) -> dict[str, object]:
    engine = service.engine_or_none
    return {
        "id": name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "mizzen",
        "root": service.served_name,
        "parent": None if name == service.served_name else service.served_name,
        "max_model_len": engine.model_len if engine else None,
    }
