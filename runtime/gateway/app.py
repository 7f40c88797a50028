"""The OpenAI side of the gateway: its routes, and what every request passes through first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.resources import files

from aiohttp import web
from aiohttp.typedefs import Handler

from mizzen.runtime.gateway.asked import Asked
from mizzen.runtime.gateway.batches.routes import BatchRoutes
from mizzen.runtime.gateway.body import read_body, refuse_large
from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.connections import Connections
from mizzen.runtime.gateway.directory import Directory, ServedModel
from mizzen.runtime.gateway.errors import (
    BadKeyError,
    GatewayError,
    UnknownModelError,
    error_body,
)
from mizzen.runtime.gateway.headers import REQUEST_ID, request_id_of
from mizzen.runtime.gateway.intake import Intake
from mizzen.runtime.gateway.keys import Client, Keyring
from mizzen.runtime.gateway.lifecycle import Lifecycle
from mizzen.runtime.gateway.limits import Account, Accounts, Limits
from mizzen.runtime.gateway.metrics import GatewayMetrics
from mizzen.runtime.gateway.reply import Reply
from mizzen.runtime.tracing import OPERATIONS, Tracing, current_span

log = logging.getLogger(__name__)

PROXIED = tuple(OPERATIONS)
_ID = web.RequestKey("request_id", str)
_CLIENT = web.RequestKey("client", Client)
_ACCOUNT = web.RequestKey("account", Account)
_MODEL = web.RequestKey("model", ServedModel)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the routes work with."""

    config: GatewayConfig
    directory: Directory
    keyring: Keyring
    metrics: GatewayMetrics
    intake: Intake
    lifecycle: Lifecycle
    accounts: Accounts
    connections: Connections
    tracing: Tracing
    on_batch: Callable[[], None]


def build_app(parts: Parts) -> web.Application:
    """Return the application that clients talk to."""
    routes = Routes(parts)
    app = web.Application(middlewares=[routes.answer_errors, routes.check_key])
    app.on_response_prepare.append(routes.finish_headers)
    app.router.add_get("/openapi.json", routes.describe)
    app.router.add_get("/v1/models", routes.list_models)
    app.router.add_get("/v1/models/{model:.+}", routes.get_model)
    for path in PROXIED:
        app.router.add_post(path, routes.proxy, expect_handler=routes.allow_body)
    BatchRoutes(
        parts.config,
        connections=parts.connections,
        owner_of=_owner_of,
        on_batch=parts.on_batch,
    ).add_to(app)
    return app


class Routes:
    """Handlers and middlewares over the gateway's parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    # What every request passes through.

    @web.middleware
    async def answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Give the request an id, turn errors into OpenAI's shape, count the answer."""
        request[_ID] = request_id_of(request.headers)
        with self._parts.lifecycle.open_request(), self._parts.connections.request(request):
            answer = await self._answer(request, handler)
        self._parts.metrics.on_answer(request.get(_MODEL), answer.status)
        return answer

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except GatewayError as error:
            return error.response()
        except web.HTTPException as error:
            return _plain_error(request, error)
        except Exception:
            log.exception("request %s failed inside the gateway", request[_ID])
            message = f"The gateway failed; its log says why under {request[_ID]}."
            return _json(500, error_body(message, "server_error"))

    @web.middleware
    async def check_key(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let nobody in without a key, whatever the path: a new route is closed by default."""
        if self._parts.config.auth == "on":
            self._identify(request)
        return await handler(request)

    def _identify(self, request: web.Request) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise BadKeyError("Send an API key in the header `Authorization: Bearer mz-...`.")
        if (client := self._parts.keyring.identify(key.strip())) is not None:
            request[_CLIENT] = client
            if client.limits != Limits():
                request[_ACCOUNT] = self._parts.accounts.of(client.account, client.limits)
            return
        if not len(self._parts.keyring):
            raise BadKeyError(
                "The gateway knows no API key yet: make one with `mizzen keys create NAME` and "
                "apply the Secret it prints in the gateway's namespace."
            )
        raise BadKeyError("The API key is not valid.")

    async def finish_headers(self, request: web.Request, answer: web.StreamResponse) -> None:
        """Name the request, and send clients elsewhere while this gateway shuts down."""
        answer.headers[REQUEST_ID] = request.get(_ID) or request_id_of(request.headers)
        answer.headers["Server"] = "mizzen"
        if (account := request.get(_ACCOUNT)) is not None:
            answer.headers.update(account.headers())
        if self._parts.lifecycle.is_draining:
            answer.headers["Connection"] = "close"
            answer.force_close()

    async def allow_body(self, request: web.Request) -> web.StreamResponse | None:
        """Answer `Expect: 100-continue`: a body that is too large need not be sent at all."""
        try:
            refuse_large(request, self._limit_bytes)
        except GatewayError as error:
            answer = error.response()
            answer.force_close()
            return answer
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # The library counts what was written to tell whether an answer has begun.
        request.writer.output_size = 0
        return None

    # Routes.

    async def describe(self, request: web.Request) -> web.Response:
        """GET /openapi.json: these routes in OpenAPI's words, generated from the runtime's."""
        document = files("mizzen.runtime.gateway").joinpath("openapi.json").read_bytes()
        return web.Response(body=document, content_type="application/json")

    async def list_models(self, request: web.Request) -> web.Response:
        """GET /v1/models: every model, and the adapters that are on some replica."""
        entries = [
            entry
            for name, model in self._parts.directory.models()
            for entry in _model_entries(name, model)
        ]
        return _json(200, {"object": "list", "data": entries})

    async def get_model(self, request: web.Request) -> web.Response:
        """GET /v1/models/MODEL."""
        wanted = request.match_info["model"]
        route = self._parts.directory.resolve(wanted)
        if route is not None:
            model, adapter = route.model, route.adapter
            if adapter is None or adapter in model.adapters:
                base = wanted if adapter is None else wanted.removesuffix(f":{adapter}")
                entries = _model_entries(base, model)
                return _json(200, next(e for e in entries if e["id"] == wanted))
        raise UnknownModelError(wanted, self._parts.directory.names())

    async def proxy(self, request: web.Request) -> web.StreamResponse:
        """POST to a model: the body names it, its replicas answer."""
        account = request.get(_ACCOUNT)
        tracing = self._parts.tracing
        with (
            tracing.request(f"POST {request.path}", request.headers) as span,
            nullcontext() if account is None else account.request(),
        ):
            answer = await self._proxy(request, account)
            span.answered(answer.status)
            return answer

    async def _proxy(self, request: web.Request, account: Account | None) -> web.StreamResponse:
        config = self._parts.config
        body = await read_body(
            request, limit_bytes=self._limit_bytes, timeout_s=config.body_timeout_s
        )
        current_span.get().name(OPERATIONS[request.path], body.model)
        route = self._parts.intake.resolve(body.model)
        request[_MODEL] = route.model
        client = request.get(_CLIENT)
        asked = Asked(
            path=request.rel_url.raw_path_qs,
            headers=request.headers,
            body=body,
            request_id=request[_ID],
            client=_owner_of(request),
            priority=0 if client is None else client.limits.priority,
            account=account,
        )
        reply = Reply(
            request,
            wants_stream=body.document.get("stream") is True,
            connections=self._parts.connections,
            most_bytes=config.max_answer_mib * 2**20,
        )
        return await self._parts.intake.answer(asked, route, reply)

    @property
    def _limit_bytes(self) -> int:
        return self._parts.config.max_body_mib * 2**20


def _owner_of(request: web.Request) -> str:
    client = request.get(_CLIENT)
    return "" if client is None else client.account


def _model_entries(name: str, model: ServedModel) -> list[dict[str, object]]:
    base: dict[str, object] = {
        "id": name,
        "object": "model",
        "created": model.created_at_s,
        "owned_by": model.namespace,
    }
    adapters = [{**base, "id": f"{name}:{adapter}", "parent": name} for adapter in model.adapters]
    return [base, *adapters]


def _plain_error(request: web.Request, error: web.HTTPException) -> web.Response:
    if error.status == 404:
        message = (
            f"There is no {request.path} here; the gateway serves /v1/models, "
            f"/v1/files, /v1/batches and {', '.join(PROXIED)}"
        )
    elif error.status == 405:
        allowed = ", ".join(sorted(error.headers.get("Allow", "").split(",")))
        message = f"{request.method} is not allowed on {request.path}; use {allowed}."
    else:
        message = error.reason
    answer = _json(error.status, error_body(message, "invalid_request_error"))
    if "Allow" in error.headers:
        answer.headers["Allow"] = error.headers["Allow"]
    return answer


def _json(status: int, document: object) -> web.Response:
    return web.Response(
        status=status, body=json.dumps(document).encode(), content_type="application/json"
    )
