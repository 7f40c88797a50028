"""The users' HTTP port: every route of it, each with its access class."""

from functools import partial

from starlette.requests import Request
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access, Gate
from mizzen.runtime.server.errors import ApiError
from mizzen.runtime.server.oip_http import oip_routes
from mizzen.runtime.server.openai_chat import chat_completions
from mizzen.runtime.server.openai_completions import completions
from mizzen.runtime.server.openai_embeddings import embeddings
from mizzen.runtime.server.openai_models import get_model, list_models
from mizzen.runtime.server.routes import Envelope, GuardedRoute, build_http_app, json_response
from mizzen.runtime.server.service import Service
from mizzen.runtime.server.tokens import detokenize, tokenize


def user_routes(service: Service) -> list[GuardedRoute]:
    """Return every route of the users' port."""
    return [
        GuardedRoute("GET", "/health", partial(_health, service), Access.OPEN),
        GuardedRoute("GET", "/v1/models", partial(list_models, service), Access.USER),
        GuardedRoute("GET", "/v1/models/{model:path}", partial(get_model, service), Access.USER),
        GuardedRoute(
            "POST", "/v1/chat/completions", partial(chat_completions, service), Access.USER
        ),
        GuardedRoute("POST", "/v1/completions", partial(completions, service), Access.USER),
        GuardedRoute("POST", "/v1/embeddings", partial(embeddings, service), Access.USER),
        GuardedRoute("POST", "/tokenize", partial(tokenize, service), Access.USER),
        GuardedRoute("POST", "/detokenize", partial(detokenize, service), Access.USER),
        *oip_routes(service),
    ]


def build_user_app(service: Service, gate: Gate) -> ASGIApp:
    """Return the users' port as an ASGI app."""
    app = build_http_app(user_routes(service), gate=gate, render_error=_render_error)
    return Envelope(app, on_open=service.open_request, on_close=service.close_request)


def _render_error(path: str, error: ApiError) -> dict[str, object]:
    # The two protocols share a port and not a shape of errors.
    return {"error": error.message} if path.startswith("/v2") else error.openai_body()


async def _health(service: Service, request: Request) -> ASGIApp:
    """Readiness where vLLM has it: load balancers written for vLLM ask here."""
    return json_response({"phase": service.phase}, status=200 if service.is_ready() else 503)
