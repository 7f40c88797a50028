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
from mizzen.runtime.server.openai_request import post_route
from mizzen.runtime.server.openapi import description_route
from mizzen.runtime.server.rollouts import rollout_routes
from mizzen.runtime.server.routes import Envelope, GuardedRoute, build_http_app, json_response
from mizzen.runtime.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from mizzen.runtime.server.service import Service
from mizzen.runtime.server.tokens import detokenize, tokenize


def user_routes(service: Service) -> list[GuardedRoute]:
    """Return every route of the users' port."""
    routes = [
        GuardedRoute("GET", "/health", partial(_health, service), Access.OPEN),
        GuardedRoute("GET", "/v1/models", partial(list_models, service), Access.USER),
        GuardedRoute("GET", "/v1/models/{model:path}", partial(get_model, service), Access.USER),
        post_route("/v1/chat/completions", chat_completions, ChatRequest, service),
        post_route("/v1/completions", completions, CompletionRequest, service),
        post_route("/v1/embeddings", embeddings, EmbeddingRequest, service),
        post_route("/tokenize", tokenize, TokenizeRequest, service),
        post_route("/detokenize", detokenize, DetokenizeRequest, service),
        *oip_routes(service),
        *rollout_routes(service),
    ]
    return [*routes, description_route(routes)]


def build_user_app(service: Service, gate: Gate) -> ASGIApp:
    """Return the users' port as an ASGI app."""
    app = build_http_app(user_routes(service), gate=gate, render_error=_render_error)
    return Envelope(
        app,
        on_open=service.open_request,
        on_close=service.close_request,
        tracing=service.tracing,
    )


def _render_error(path: str, error: ApiError) -> dict[str, object]:
    # The two protocols share a port and not a shape of errors.
    return {"error": error.message} if path.startswith("/v2") else error.openai_body()


async def _health(service: Service, request: Request) -> ASGIApp:
    """Readiness where vLLM has it: load balancers written for vLLM ask here."""
    return json_response({"phase": service.phase}, status=200 if service.is_ready() else 503)
