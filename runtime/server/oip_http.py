"""Open Inference Protocol v2 over HTTP, as tritonclient.http speaks it."""

import json
import zlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial, wraps
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from mizzen.runtime.server.access import Access
from mizzen.runtime.server.adapters import load_adapter, source_from_parameters, unload_adapter
from mizzen.runtime.server.errors import ApiError, from_validation, invalid
from mizzen.runtime.server.oip_bodies import IndexBody, InferBody, InputTensor, RepositoryBody
from mizzen.runtime.server.oip_infer import (
    InferCall,
    check_version,
    run_whole,
    to_inputs,
    understand,
    wanted_output,
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

Asked = TypeVar("Asked", bound=BaseModel)
_Call = Callable[[Service, Request], Awaitable[ASGIApp]]
_PostCall = Callable[[Service, Request, Asked, bytes], Awaitable[ASGIApp]]

_HEADER_LENGTH = "inference-header-content-length"
_LENGTH_DIGITS = 16
_WBITS = {"gzip": 31, "deflate": 15}


def oip_routes(service: Service) -> list[GuardedRoute]:
    """Return the protocol's routes."""

    def route(method: str, path: str, call: _Call, access: Access) -> GuardedRoute:
        return GuardedRoute(method, f"/v2{path}", partial(call, service), access)

    def post(
        path: str, call: _PostCall[Asked], kind: type[Asked], access: Access = Access.USER
    ) -> GuardedRoute:
        @wraps(call)
        async def endpoint(request: Request) -> ASGIApp:
            header, raw = await _read(service, request)
            return await call(service, request, _parse(kind, header or b"{}"), raw)

        return GuardedRoute("POST", f"/v2{path}", endpoint, access, body=kind)

    repository = "/repository/models/{model:path}"
    fixed = [
        route("GET", "", _server_metadata, Access.USER),
        route("GET", "/health/live", _live, Access.OPEN),
        route("GET", "/health/ready", _ready, Access.OPEN),
        route("GET", "/models/stats", _statistics, Access.USER),
        post("/repository/index", _index, IndexBody),
        post(f"{repository}/load", _load, RepositoryBody, Access.ADMIN),
        post(f"{repository}/unload", _unload, RepositoryBody, Access.ADMIN),
    ]
    # A model's name may hold slashes, so what follows it is matched first, the bare name last.
    versions = [f"/models/{{model:path}}{version}" for version in ("/versions/{version}", "")]
    infer = [post(f"{model}/infer", _infer, InferBody) for model in versions]
    models = [
        route("GET", f"{model}{end}", call, Access.USER)
        for end, call in (
            ("/ready", _model_ready),
            ("/config", _config),
            ("/stats", _statistics),
            ("", _model_metadata),
        )
        for model in versions
    ]
    unsupported = [
        route(method, f"/{area}{{rest:path}}", _unsupported, Access.USER)
        for area in ("systemsharedmemory", "cudasharedmemory", "trace", "logging")
        for method in ("GET", "POST")
    ]
    return [*fixed, *infer, *models, *unsupported]


async def _live(service: Service, request: Request) -> ASGIApp:
    """Whether a restart would not help."""
    return Response(status_code=200 if service.is_alive() else 503)


async def _ready(service: Service, request: Request) -> ASGIApp:
    """Whether new requests should come here."""
    return Response(status_code=200 if service.is_ready() else 503)


async def _server_metadata(service: Service, request: Request) -> ASGIApp:
    """Name, version and extensions."""
    return json_response(server_metadata())


def _model(service: Service, request: Request) -> str:
    name = request.path_params["model"]
    service.resolve(name)
    check_version(request.path_params.get("version", ""))
    return str(name)


async def _model_ready(service: Service, request: Request) -> ASGIApp:
    """Whether a model can be asked now."""
    _model(service, request)
    return Response(status_code=200 if service.is_ready() else 503)


async def _model_metadata(service: Service, request: Request) -> ASGIApp:
    """Inputs and outputs of a model."""
    return json_response(model_metadata(_model(service, request)))


async def _config(service: Service, request: Request) -> ASGIApp:
    """The same, as a Triton model configuration."""
    return json_response(model_config(_model(service, request)))


async def _statistics(service: Service, request: Request) -> ASGIApp:
    """How often models were used."""
    named = "model" in request.path_params
    names = [_model(service, request)] if named else service.model_names()
    return json_response(model_statistics(service, names))


async def _index(service: Service, request: Request, asked: IndexBody, raw: bytes) -> ASGIApp:
    """The base model and its adapters."""
    return json_response(repository_index(service, ready_only=asked.ready))


async def _load(service: Service, request: Request, asked: RepositoryBody, raw: bytes) -> ASGIApp:
    """Load an adapter."""
    source = source_from_parameters(asked.parameters)
    await load_adapter(service, request.path_params["model"], source)
    return Response(status_code=200)


async def _unload(service: Service, request: Request, asked: RepositoryBody, raw: bytes) -> ASGIApp:
    """Unload an adapter."""
    await unload_adapter(service, request.path_params["model"])
    return Response(status_code=200)


async def _unsupported(service: Service, request: Request) -> ASGIApp:
    """Answers that Triton's other extensions are not there."""
    raise ApiError(400, "Shared memory, trace and log settings are not supported here.")


async def _infer(service: Service, request: Request, asked: InferBody, raw: bytes) -> ASGIApp:
    """Answer one prompt, whole."""
    call = InferCall(
        model=request.path_params["model"],
        version=request.path_params.get("version", ""),
        call_id=asked.id,
        inputs=to_inputs(_input_tensors(asked.inputs, raw)),
        outputs=tuple(
            wanted_output(output.name, output.parameters.model_extra or {})
            for output in asked.outputs
        ),
        parameters=asked.parameters,
    )
    understood = await understand(service, call)
    if understood.stream:
        raise invalid("stream", "HTTP infer cannot stream; use the gRPC stream or OpenAI's API.")
    return _answer(call, await run_whole(service, understood), _binary_outputs(asked))


async def _read(service: Service, request: Request) -> tuple[bytes, bytes]:
    """Return a body's JSON, and the tensors behind it."""
    body = await _body(service, request)
    return _split(body, request.headers.get(_HEADER_LENGTH))


def _parse(kind: type[Asked], data: bytes) -> Asked:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from error


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
    # isdigit() alone takes other scripts' digits, and int() refuses thousands of them.
    is_number = length.isascii() and length.isdigit() and len(length) < _LENGTH_DIGITS
    if not is_number or int(length) > len(body):
        raise invalid(_HEADER_LENGTH, "Inference-Header-Content-Length is not within the body.")
    return body[: int(length)], body[int(length) :]


def _input_tensors(inputs: Sequence[InputTensor], raw: bytes) -> list[Tensor]:
    tensors, at = [], 0
    for given in inputs:
        name, size = given.name, given.parameters.binary_data_size
        if size is None:
            if given.data is None:
                raise invalid(name, f"{name}: data is missing.")
            tensors.append(from_values(name, given.datatype, given.data))
            continue
        if size > len(raw) - at:
            raise invalid(name, f"{name}: binary_data_size is not within the body.")
        tensors.append(from_raw(name, given.datatype, raw[at : at + size]))
        at += size
    return tensors


def _binary_outputs(asked: InferBody) -> dict[str, bool]:
    """Return which outputs are wanted as bytes; the key "" stands for those not listed."""
    default = asked.parameters.get("binary_data_output") is True
    wanted = {
        output.name: default
        if output.parameters.binary_data is None
        else output.parameters.binary_data
        for output in asked.outputs
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
