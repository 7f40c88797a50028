"""Open Inference Protocol v2 over HTTP, as tritonclient.http speaks it."""

import json
import zlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access
from mizzen.runtime.server.adapters import load_adapter, source_from_parameters, unload_adapter
from mizzen.runtime.server.errors import ApiError, invalid
from mizzen.runtime.server.oip_infer import (
    InferCall,
    check_version,
    run_whole,
    to_inputs,
    understand,
)
from mizzen.runtime.server.oip_models import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from mizzen.runtime.server.oip_tensors import Tensor, from_raw, from_values, to_json, to_raw
from mizzen.runtime.server.routes import (
    GuardedRoute,
    json_response,
    read_body,
    too_large,
)
from mizzen.runtime.server.service import Service

_Call = Callable[[Service, Request], Awaitable[ASGIApp]]

_HEADER_LENGTH = "inference-header-content-length"
_WBITS = {"gzip": 31, "deflate": 15}


def oip_routes(service: Service) -> list[GuardedRoute]:
    """Return the protocol's routes."""

    def route(method: str, path: str, call: _Call, access: Access) -> GuardedRoute:
        return GuardedRoute(method, f"/v2{path}", partial(call, service), access)

    fixed = [
        route("GET", "", _server_metadata, Access.USER),
        route("GET", "/health/live", _live, Access.OPEN),
        route("GET", "/health/ready", _ready, Access.OPEN),
        route("GET", "/models/stats", _statistics, Access.USER),
        route("POST", "/repository/index", _index, Access.USER),
        route("POST", "/repository/models/{model:path}/load", _load, Access.ADMIN),
        route("POST", "/repository/models/{model:path}/unload", _unload, Access.ADMIN),
    ]
    # A model's name may hold slashes, so what follows it is matched first, the bare name last.
    models = [
        route(method, f"/models/{{model:path}}{version}{end}", call, Access.USER)
        for method, end, call in (
            ("POST", "/infer", _infer),
            ("GET", "/ready", _model_ready),
            ("GET", "/config", _config),
            ("GET", "/stats", _statistics),
            ("GET", "", _model_metadata),
        )
        for version in ("/versions/{version}", "")
    ]
    unsupported = [
        route(method, f"/{area}{{rest:path}}", _unsupported, Access.USER)
        for area in ("systemsharedmemory", "cudasharedmemory", "trace", "logging")
        for method in ("GET", "POST")
    ]
    return [*fixed, *models, *unsupported]


async def _live(service: Service, request: Request) -> ASGIApp:
    return Response(status_code=200 if service.is_alive() else 503)


async def _ready(service: Service, request: Request) -> ASGIApp:
    return Response(status_code=200 if service.is_ready() else 503)


async def _server_metadata(service: Service, request: Request) -> ASGIApp:
    return json_response(server_metadata())


def _model(service: Service, request: Request) -> str:
    name = request.path_params["model"]
    service.resolve(name)
    check_version(request.path_params.get("version", ""))
    return str(name)


async def _model_ready(service: Service, request: Request) -> ASGIApp:
    _model(service, request)
    return Response(status_code=200 if service.is_ready() else 503)


async def _model_metadata(service: Service, request: Request) -> ASGIApp:
    return json_response(model_metadata(_model(service, request)))


async def _config(service: Service, request: Request) -> ASGIApp:
    return json_response(model_config(_model(service, request)))


async def _statistics(service: Service, request: Request) -> ASGIApp:
    named = "model" in request.path_params
    names = [_model(service, request)] if named else service.model_names()
    return json_response(model_statistics(service, names))


async def _index(service: Service, request: Request) -> ASGIApp:
    asked = _json(await _body(service, request) or b"{}")
    return json_response(repository_index(service, ready_only=asked.get("ready") is True))


async def _load(service: Service, request: Request) -> ASGIApp:
    parameters = _json(await _body(service, request) or b"{}").get("parameters", {})
    if not isinstance(parameters, dict):
        raise invalid("parameters", "parameters is not an object.")
    source = source_from_parameters(parameters)
    await load_adapter(service, request.path_params["model"], source)
    return Response(status_code=200)


async def _unload(service: Service, request: Request) -> ASGIApp:
    await _body(service, request)
    await unload_adapter(service, request.path_params["model"])
    return Response(status_code=200)


async def _unsupported(service: Service, request: Request) -> ASGIApp:
    raise ApiError(400, "Shared memory, trace and log settings are not supported here.")


async def _infer(service: Service, request: Request) -> ASGIApp:
    body = await _body(service, request)
    header, raw = _split(body, request.headers.get(_HEADER_LENGTH))
    asked = _json(header)
    call = InferCall(
        model=request.path_params["model"],
        version=request.path_params.get("version", ""),
        call_id=str(asked.get("id", "")),
        inputs=to_inputs(_input_tensors(_objects(asked, "inputs"), raw)),
        outputs=tuple(str(output.get("name")) for output in _objects(asked, "outputs")),
        parameters=_parameters(asked),
    )
    understood = await understand(service, call)
    if understood.stream:
        raise invalid("stream", "HTTP infer cannot stream; use the gRPC stream or OpenAI's API.")
    return _answer(call, await run_whole(service, understood), _binary_outputs(asked))


async def _body(service: Service, request: Request) -> bytes:
    limit = service.config.max_body_bytes
    body = await read_body(request, limit=limit)
    encoding = request.headers.get("content-encoding", "identity")
    return body if encoding == "identity" else _inflate(body, encoding, limit)


def _inflate(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding not in _WBITS:
        raise ApiError(415, f"Content-Encoding {encoding} is not supported; use gzip or deflate.")
    inflater = zlib.decompressobj(_WBITS[encoding])
    try:
        plain = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(None, f"The body is not valid {encoding}.") from error
    if len(plain) > limit:
        raise too_large(limit)
    if not inflater.eof:
        raise invalid(None, f"The {encoding} body is cut short.")
    return plain


def _split(body: bytes, length: str | None) -> tuple[bytes, bytes]:
    if length is None:
        return body, b""
    if not length.isdigit() or int(length) > len(body):
        raise invalid(_HEADER_LENGTH, "Inference-Header-Content-Length is not within the body.")
    return body[: int(length)], body[int(length) :]


def _json(data: bytes) -> dict[str, object]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(None, "The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(document, dict):
        raise invalid(None, "The body is not a JSON object.", code="invalid_json")
    return document


def _objects(document: dict[str, object], name: str) -> list[dict[str, object]]:
    found = document.get(name, [])
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        return found
    raise invalid(name, f"{name} is not a list of objects.")


def _parameters(document: dict[str, object]) -> dict[str, object]:
    found = document.get("parameters", {})
    return found if isinstance(found, dict) else {}


def _input_tensors(inputs: Sequence[dict[str, object]], raw: bytes) -> list[Tensor]:
    tensors, at = [], 0
    for given in inputs:
        name, datatype = str(given.get("name")), str(given.get("datatype"))
        size = _parameters(given).get("binary_data_size")
        if size is None:
            data = given.get("data")
            if not isinstance(data, list):
                raise invalid(name, f"{name}: data is missing or not a list.")
            tensors.append(from_values(name, datatype, data))
            continue
        if not isinstance(size, int) or not 0 <= size <= len(raw) - at:
            raise invalid(name, f"{name}: binary_data_size is not within the body.")
        tensors.append(from_raw(name, datatype, raw[at : at + size]))
        at += size
    return tensors


def _binary_outputs(asked: dict[str, object]) -> dict[str, bool]:
    """Return which outputs are wanted as bytes; the key "" stands for those not listed."""
    default = _parameters(asked).get("binary_data_output") is True
    wanted = {
        str(output.get("name")): _parameters(output).get("binary_data", default) is True
        for output in _objects(asked, "outputs")
    }
    return {"": default, **wanted}


def _answer(call: InferCall, tensors: Sequence[Tensor], binary: dict[str, bool]) -> Response:
    outputs, blobs = [], []
    for tensor in tensors:
        output: dict[str, object] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if binary.get(tensor.name, binary[""]):
            blob = to_raw(tensor)
            output["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            output["data"] = to_json(tensor)
        outputs.append(output)
    body = {"model_name": call.model, "model_version": "1", "outputs": outputs}
    if call.call_id:
        body["id"] = call.call_id
    if not blobs:
        return json_response(body)
    header = json.dumps(body, separators=(",", ":")).encode()
    return Response(
        b"".join([header, *blobs]),
        headers={"Inference-Header-Content-Length": str(len(header))},
        media_type="application/octet-stream",
    )
