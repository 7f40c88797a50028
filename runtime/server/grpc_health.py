"""grpc.health.v1, so that gRPC probes and load balancers can ask. Two messages, written here."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc  # type: ignore[import-untyped]

SERVICE = "grpc.health.v1.Health"

_UNKNOWN_SERVICE, _SERVING, _NOT_SERVING = 3, 1, 2
_POLL_S = 0.5

Known = Callable[[str], bool]
Ready = Callable[[], bool]


def health_handler(is_known: Known, is_ready: Ready) -> grpc.GenericRpcHandler:
    """Return the service: `is_known` says whether a service name exists, "" is the server."""

    def status(service: str) -> int:
        if not is_known(service):
            return _UNKNOWN_SERVICE
        return _SERVING if is_ready() else _NOT_SERVING

    async def check(service: str, context: grpc.aio.ServicerContext) -> int:
        if not is_known(service):
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return status(service)

    async def watch(service: str, context: grpc.aio.ServicerContext) -> AsyncIterator[int]:
        told = None
        while True:
            if (now := status(service)) != told:
                yield now
                told = now
            await asyncio.sleep(_POLL_S)

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Check": grpc.unary_unary_rpc_method_handler(check, _read_request, _write_response),
            "Watch": grpc.unary_stream_rpc_method_handler(watch, _read_request, _write_response),
        },
    )


def _read_request(data: bytes) -> str:
    """HealthCheckRequest { string service = 1; }: a tag, a length, the name."""
    if not data:
        return ""
    size, at, shift = 0, 1, 0
    while True:
        byte = data[at]
        size |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if data[0] != 0x0A or at + size != len(data):
        raise ValueError("not a HealthCheckRequest")
    return data[at:].decode()


def _write_response(status: int) -> bytes:
    """HealthCheckResponse { ServingStatus status = 1; }."""
    return bytes((0x08, status))
