"""The admin port: health that tells the truth, metrics, changes to what runs. Not for users."""

import asyncio
from functools import partial
from typing import TypeVar

from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access, Gate
from mizzen.runtime.server.adapters import adapters_body, checked_path, swap_weights
from mizzen.runtime.server.drain import Drain
from mizzen.runtime.server.errors import ApiError, from_validation
from mizzen.runtime.server.loans import look_at_loan, start_loan, stop_loan
from mizzen.runtime.server.routes import GuardedRoute, build_http_app, json_response, read_body
from mizzen.runtime.server.service import Phase, Service
from mizzen.runtime.server.weights import WeightSwaps

Asked = TypeVar("Asked", bound=BaseModel)

_BODY_LIMIT = 64 * 1024
_JOB_LIMIT = 1024 * 1024  # what a ConfigMap holds


class DrainRequest(BaseModel):
    """Body of POST /drain and POST /sleep."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    timeout_s: float | None = Field(None, ge=0, le=86_400, alias="timeoutSeconds")


class WeightsRequest(BaseModel):
    """Body of POST /weights."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(min_length=1, max_length=4096)


def admin_routes(service: Service, drain: Drain) -> list[GuardedRoute]:
    """Return every route of the admin port."""
    swaps = WeightSwaps(partial(swap_weights, service))
    return [
        GuardedRoute("GET", "/healthz", partial(_healthz, service), Access.OPEN),
        GuardedRoute("GET", "/readyz", partial(_readyz, service), Access.OPEN),
        GuardedRoute("GET", "/metrics", partial(_metrics, service), Access.OPEN),
        GuardedRoute("GET", "/loading", partial(_loading, service), Access.ADMIN),
        GuardedRoute("GET", "/model", partial(_model, service), Access.ADMIN),
        GuardedRoute("GET", "/drain", partial(_drain_state, service), Access.ADMIN),
        GuardedRoute("POST", "/drain", partial(_begin_drain, service, drain), Access.ADMIN),
        GuardedRoute("GET", "/adapters", partial(_adapters, service), Access.ADMIN),
        GuardedRoute("POST", "/sleep", partial(_sleep, service), Access.ADMIN),
        GuardedRoute("POST", "/wake", partial(_wake, service), Access.ADMIN),
        GuardedRoute("POST", "/weights", partial(_weights, service, swaps), Access.ADMIN),
        GuardedRoute("GET", "/loan", partial(_loan, service), Access.ADMIN),
        GuardedRoute("PUT", "/loan", partial(_lend, service), Access.ADMIN),
        GuardedRoute("DELETE", "/loan", partial(_take_back, service), Access.ADMIN),
    ]


def build_admin_app(service: Service, gate: Gate, drain: Drain) -> ASGIApp:
    """Return the admin port as an ASGI app."""
    return build_http_app(admin_routes(service, drain), gate=gate, render_error=_render_error)


def _render_error(path: str, error: ApiError) -> dict[str, object]:
    return {"error": error.message}


async def _healthz(service: Service, request: Request) -> ASGIApp:
    """Say whether a restart would help. A model may load as long as its start probe lets it."""
    alive = service.is_alive()
    body = {"alive": alive, "phase": service.phase}
    return json_response(body, status=200 if alive else 503)


async def _readyz(service: Service, request: Request) -> ASGIApp:
    """Say whether new requests should come here."""
    ready = service.is_ready()
    body = {"ready": ready, "phase": service.phase}
    return json_response(body, status=200 if ready else 503)


async def _metrics(service: Service, request: Request) -> ASGIApp:
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def _loading(service: Service, request: Request) -> ASGIApp:
    """Say how far the model's files have come; null while none are being brought here."""
    return json_response({"phase": service.phase, "loading": service.files.progress.to_api()})


async def _model(service: Service, request: Request) -> ASGIApp:
    """Say what the model is made of and how much of it fits here; the operator plans with that."""
    engine = service.engine
    stats, sizes = engine.stats(), engine.sizes
    body = {
        "layers": sizes.layers,
        "hidden": sizes.hidden,
        "heads": sizes.heads,
        "kvHeads": sizes.kv_heads,
        "headDim": sizes.head_dim,
        "contextTokens": sizes.context_tokens,
        "parameters": sizes.parameters,
        "layerParameters": sizes.layer_parameters,
        "tableParameters": sizes.table_parameters,
        "dtype": sizes.dtype,
        "deviceBytes": sizes.device_bytes or None,
        "kvTokens": stats.blocks_total * stats.block_size,
        "maxModelLen": engine.model_len,
    }
    return json_response(body)


async def _drain_state(service: Service, request: Request) -> ASGIApp:
    return json_response(_drain_body(service))


async def _begin_drain(service: Service, drain: Drain, request: Request) -> ASGIApp:
    drain.begin(await _timeout_s(service, request))
    return json_response(_drain_body(service), status=202)


async def _timeout_s(service: Service, request: Request) -> float:
    asked = await _parse(request, DrainRequest)
    return service.config.drain_seconds if asked.timeout_s is None else asked.timeout_s


async def _parse(request: Request, kind: type[Asked]) -> Asked:
    body = await read_body(request, limit=_BODY_LIMIT)
    try:
        return kind.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise from_validation(error) from error


def _drain_body(service: Service) -> dict[str, object]:
    return {"draining": service.is_draining, "inFlight": service.in_flight()}


async def _adapters(service: Service, request: Request) -> ASGIApp:
    return json_response(adapters_body(service))


async def _sleep(service: Service, request: Request) -> ASGIApp:
    timeout_s = await _timeout_s(service, request)
    async with service.change_lock:
        if service.phase not in (Phase.SERVING, Phase.ASLEEP):
            raise ApiError(
                409, f"Only a replica that serves can sleep; this one is {service.phase}."
            )
        service.phase = Phase.ASLEEP
        await service.engine.sleep(timeout_s)
    return json_response({"asleep": True})


async def _wake(service: Service, request: Request) -> ASGIApp:
    async with service.change_lock:
        await service.engine.wake()
        if service.phase is Phase.ASLEEP:  # and not draining by now
            service.phase = Phase.SERVING
    return json_response({"asleep": False})


async def _weights(service: Service, swaps: WeightSwaps, request: Request) -> ASGIApp:
    """Swap the weights under what is served; the prefix cache forgets what the old ones made."""
    asked = await _parse(request, WeightsRequest)
    roots = (*service.config.adapter_roots, service.config.model_path)
    path = await asyncio.to_thread(checked_path, asked.path, roots)
    await swaps.ask(path)
    return json_response({"path": str(path)})


async def _loan(service: Service, request: Request) -> ASGIApp:
    return json_response(await look_at_loan(service))


async def _lend(service: Service, request: Request) -> ASGIApp:
    """Have a job train while nobody asks; the same one again says how far it is."""
    body = await read_body(request, limit=_JOB_LIMIT)
    return json_response(await start_loan(service, body.decode(errors="replace")), status=202)


async def _take_back(service: Service, request: Request) -> ASGIApp:
    return json_response(await stop_loan(service), status=202)
