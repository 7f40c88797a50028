"""The gRPC port: which method may be called by whom, and the server that listens."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

import grpc  # type: ignore[import-untyped]

from mizzen.runtime.server import grpc_health
from mizzen.runtime.server.access import Access, Gate
from mizzen.runtime.server.errors import ApiError
from mizzen.runtime.server.oip_grpc import Context, InferenceServicer, abort_with
from mizzen.runtime.server.oip_messages import service_pb2_grpc
from mizzen.runtime.server.service import Service

INFERENCE = "inference.GRPCInferenceService"

# A method that is not listed is refused, whatever a later tritonclient may bring.
METHOD_ACCESS: Mapping[str, Access] = {
    f"/{grpc_health.SERVICE}/Check": Access.OPEN,
    f"/{grpc_health.SERVICE}/Watch": Access.OPEN,
    f"/{INFERENCE}/ServerLive": Access.OPEN,
    f"/{INFERENCE}/ServerReady": Access.OPEN,
    f"/{INFERENCE}/ModelReady": Access.USER,
    f"/{INFERENCE}/ServerMetadata": Access.USER,
    f"/{INFERENCE}/ModelMetadata": Access.USER,
    f"/{INFERENCE}/ModelConfig": Access.USER,
    f"/{INFERENCE}/ModelStatistics": Access.USER,
    f"/{INFERENCE}/ModelInfer": Access.USER,
    f"/{INFERENCE}/ModelStreamInfer": Access.USER,
    f"/{INFERENCE}/RepositoryIndex": Access.USER,
    f"/{INFERENCE}/RepositoryModelLoad": Access.ADMIN,
    f"/{INFERENCE}/RepositoryModelUnload": Access.ADMIN,
    # Answered UNIMPLEMENTED.
    f"/{INFERENCE}/SystemSharedMemoryStatus": Access.USER,
    f"/{INFERENCE}/SystemSharedMemoryRegister": Access.USER,
    f"/{INFERENCE}/SystemSharedMemoryUnregister": Access.USER,
    f"/{INFERENCE}/CudaSharedMemoryStatus": Access.USER,
    f"/{INFERENCE}/CudaSharedMemoryRegister": Access.USER,
    f"/{INFERENCE}/CudaSharedMemoryUnregister": Access.USER,
    f"/{INFERENCE}/TraceSetting": Access.USER,
    f"/{INFERENCE}/LogSettings": Access.USER,
}


class GuardInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Checks every call before its method sees it."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return the method's handler with the checks before it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        return self._guarded(handler, METHOD_ACCESS.get(handler_call_details.method))

    def _guarded(
        self, handler: grpc.RpcMethodHandler, access: Access | None
    ) -> grpc.RpcMethodHandler:
        codec = (_forgiving(handler.request_deserializer), handler.response_serializer)
        if handler.response_streaming:

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                await self._check(access, context)
                given = _Given(request) if handler.request_streaming else request
                method = handler.stream_stream or handler.unary_stream
                if given is not _UNREADABLE:
                    async for response in method(given, context):
                        yield response
                if given is _UNREADABLE or (handler.request_streaming and given.is_broken):
                    await abort_with(context, _not_a_message())

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, *codec)

        async def unary(request: Any, context: Context) -> Any:
            await self._check(access, context)
            if request is _UNREADABLE:
                await abort_with(context, _not_a_message())
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(unary, *codec)

    async def _check(self, access: Access | None, context: Context) -> None:
        if access is None:
            await abort_with(context, ApiError(403, "This method is not served."))
            return
        metadata = dict(context.invocation_metadata() or ())
        refusal = self._gate.check(
            access,
            authorization=str(metadata.get("authorization", "")),
            peer=_peer_address(context.peer()),
        )
        if refusal:
            await abort_with(context, ApiError(refusal.status, refusal.message))


# grpc answers what its deserializer raises with UNKNOWN, as if the server had failed.
_UNREADABLE = object()


def _forgiving(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_not(data: bytes) -> Any:
        try:
            return read(data)
        except Exception:
            return _UNREADABLE

    return read_or_not


class _Given:
    """A client's stream of messages up to the first that cannot be read."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.is_broken = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for message in self._messages:
            if message is _UNREADABLE:
                self.is_broken = True
                return
            yield message


def _not_a_message() -> ApiError:
    return ApiError(400, "The bytes sent are not a message of this method.")


def _peer_address(peer: str) -> str:
    """Return the IP address of "ipv4:127.0.0.1:4000" or "ipv6:[::1]:4000", else ""."""
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0]
    return host.strip("[]") if family in ("ipv4", "ipv6") else ""


def build_grpc_server(service: Service, gate: Gate, *, host: str, port: int) -> tuple[Any, int]:
    """Return a server that is bound and not started, and its port.

    Raises:
        RuntimeError: the port is taken.
    """
    limit = service.config.max_body_bytes
    server = grpc.aio.server(
        interceptors=[GuardInterceptor(gate)],
        options=[
            ("grpc.max_receive_message_length", limit),
            # Two servers on one port would each get some of the calls.
            ("grpc.so_reuseport", 0),
        ],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service), server)
    known = ("", INFERENCE, grpc_health.SERVICE)
    server.add_generic_rpc_handlers(
        (grpc_health.health_handler(known.__contains__, service.is_ready),)
    )
    address = f"[{host}]" if ":" in host else host
    return server, server.add_insecure_port(f"{address}:{port}")
