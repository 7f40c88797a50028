"""Open Inference Protocol v2 over gRPC, as tritonclient.grpc speaks it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc  # type: ignore[import-untyped]
from google.protobuf import json_format  # type: ignore[import-untyped]

from mizzen.runtime.server.adapters import load_adapter, source_from_parameters, unload_adapter
from mizzen.runtime.server.errors import ApiError, to_api_error
from mizzen.runtime.server.oip_infer import (
    InferCall,
    Inference,
    answer_tensors,
    check_version,
    run_stream,
    run_whole,
    timed_out,
    to_inputs,
    understand,
    wanted_output,
)
from mizzen.runtime.server.oip_messages import (
    model_config_pb2,
    service_pb2,
    service_pb2_grpc,
)
from mizzen.runtime.server.oip_models import (
    model_config,
    model_metadata,
    model_statistics,
    repository_index,
    server_metadata,
)
from mizzen.runtime.server.oip_tensors import Tensor, from_raw, from_values, to_raw
from mizzen.runtime.server.service import Service
from mizzen.runtime.tracing import Span

# Neither grpc nor the generated messages bring types.
Context: TypeAlias = Any
Message: TypeAlias = Any

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


# A text that quotes the request may be as long as that; over the limit of a trailer (8 KiB, with
# three bytes for each that is not ASCII) clients get an error of their own in its place.
_MOST_DETAILS = 512


# Of one stream. A client may send and never read; what it is owed then must not fill the memory.
_MOST_OPEN = 256  # requests that are being answered
_MOST_UNREAD = 1024  # responses


async def abort_with(context: Context, error: ApiError) -> None:
    """End a call with an error's status."""
    if error.retry_after_s is not None:
        context.set_trailing_metadata((("retry-after", error.headers()["Retry-After"]),))
    code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, error.message[:_MOST_DETAILS])


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The calls that are served; the generated base class answers UNIMPLEMENTED to the rest."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def ServerLive(self, request: Message, context: Context) -> Message:
        """Whether a restart would not help."""
        return service_pb2.ServerLiveResponse(live=self._service.is_alive())

    async def ServerReady(self, request: Message, context: Context) -> Message:
        """Whether new requests should come here."""
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready())

    async def ModelReady(self, request: Message, context: Context) -> Message:
        """Whether a model can be asked now."""
        await self._check_model(request, context)
        return service_pb2.ModelReadyResponse(ready=self._service.is_ready())

    async def ServerMetadata(self, request: Message, context: Context) -> Message:
        """Name, version and extensions."""
        return json_format.ParseDict(server_metadata(), service_pb2.ServerMetadataResponse())

    async def ModelMetadata(self, request: Message, context: Context) -> Message:
        """Inputs and outputs of a model."""
        await self._check_model(request, context)
        body = model_metadata(request.name)
        return json_format.ParseDict(body, service_pb2.ModelMetadataResponse())

    async def ModelConfig(self, request: Message, context: Context) -> Message:
        """The same, as a Triton model configuration."""
        await self._check_model(request, context)
        config = json_format.ParseDict(model_config(request.name), model_config_pb2.ModelConfig())
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelStatistics(self, request: Message, context: Context) -> Message:
        """How often each model was used."""
        if request.name:
            await self._check_model(request, context)
        names = [request.name] if request.name else self._service.model_names()
        body = model_statistics(self._service, names)
        return json_format.ParseDict(body, service_pb2.ModelStatisticsResponse())

    async def RepositoryIndex(self, request: Message, context: Context) -> Message:
        """The base model and its adapters."""
        models = repository_index(self._service, ready_only=request.ready)
        return json_format.ParseDict({"models": models}, service_pb2.RepositoryIndexResponse())

    async def RepositoryModelLoad(self, request: Message, context: Context) -> Message:
        """Load an adapter."""
        try:
            source = source_from_parameters(_parameters(request.parameters))
            await load_adapter(self._service, request.model_name, source)
        except ApiError as error:
            await abort_with(context, error)
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Message, context: Context) -> Message:
        """Unload an adapter."""
        try:
            await unload_adapter(self._service, request.model_name)
        except ApiError as error:
            await abort_with(context, error)
        return service_pb2.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: Message, context: Context) -> Message:
        """Answer one prompt, whole."""
        with self._inference(context) as span:
            try:
                call = _call(request)
                asked = await understand(self._service, call)
                if asked.stream:
                    raise ApiError(400, "ModelInfer cannot stream; use ModelStreamInfer.")
                tensors = await run_whole(self._service, asked)
                span.answered(200)
                return _response(call, tensors)
            except Exception as error:
                answer = to_api_error(error)
                span.answered(answer.status)
                await abort_with(context, answer)
        raise AssertionError("abort raises")

    async def ModelStreamInfer(
        self, requests: AsyncIterator[Message], context: Context
    ) -> AsyncIterator[Message]:
        """Answer prompts as they come, each with as many responses as it has pieces."""
        ready = _Responses()
        reader = asyncio.create_task(self._read(requests, ready, context))
        try:
            while (response := await ready.get()) is not None:
                yield response
        finally:
            reader.cancel()  # the client has gone or has everything; its answers go with it
            await asyncio.wait((reader,))

    async def _read(
        self,
        requests: AsyncIterator[Message],
        ready: "_Responses",
        context: Context,
    ) -> None:
        room = asyncio.Semaphore(_MOST_OPEN)
        try:
            async with asyncio.TaskGroup() as answers:
                async for request in requests:
                    await room.acquire()
                    task = answers.create_task(self._answer(request, ready, context))
                    task.add_done_callback(lambda _: room.release())
        finally:
            ready.end()

    async def _answer(self, request: Message, ready: "_Responses", context: Context) -> None:
        with self._inference(context) as span:
            try:
                call = _call(request)
                asked = await understand(self._service, call)
                async with asyncio.timeout(asked.timeout_s):
                    await self._respond(call, asked, ready)
            except Exception as error:
                error = timed_out() if isinstance(error, TimeoutError) else error
                answer = to_api_error(error)
                span.answered(answer.status)
                await ready.put(_failure(request, answer))
            else:
                span.answered(200)

    async def _respond(self, call: InferCall, asked: Inference, ready: "_Responses") -> None:
        if not asked.stream:
            tensors = await run_whole(self._service, asked)
            await ready.put(_streamed(_response(call, tensors), final=True))
            return
        sent = 0
        async with aclosing(run_stream(self._service, asked)) as outputs:
            async for output in outputs:
                count, sent = output.output_tokens - sent, output.output_tokens
                tensors = answer_tensors(asked, output, text=output.text, count=count)
                final = output.finish_reason is not None
                await ready.put(_streamed(_response(call, tensors), final=final))

    async def _check_model(self, request: Message, context: Context) -> None:
        try:
            self._service.resolve(request.name)
            check_version(request.version)
        except ApiError as error:
            await abort_with(context, error)

    @contextmanager
    def _inference(self, context: Context) -> Iterator[Span]:
        """Count a request, and have its span, until its answer is made."""
        self._service.open_request()
        headers = {key: str(value) for key, value in context.invocation_metadata() or ()}
        try:
            with self._service.tracing.request("ModelInfer", headers) as span:
                yield span
        finally:
            self._service.close_request()


class _Responses:
    """Responses on their way to one client; who makes them waits while it does not read."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MOST_UNREAD)

    async def put(self, response: Message) -> None:
        """Add a response, as soon as there is room for it."""
        await self._room.acquire()
        self._queue.put_nowait(response)

    def end(self) -> None:
        """Say that no more will come."""
        self._queue.put_nowait(None)

    async def get(self) -> Message | None:
        """Wait for the next response, None at the end."""
        response = await self._queue.get()
        self._room.release()
        return response


def _call(request: Message) -> InferCall:
    return InferCall(
        model=request.model_name,
        version=request.model_version,
        call_id=request.id,
        inputs=to_inputs(_tensors(request)),
        outputs=tuple(
            wanted_output(output.name, _parameters(output.parameters)) for output in request.outputs
        ),
        parameters=_parameters(request.parameters),
    )


def _tensors(request: Message) -> list[Tensor]:
    raw: Sequence[bytes] = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise ApiError(400, "raw_input_contents must hold one entry for each input.")
    if raw:
        return [
            from_raw(given.name, given.datatype, data)
            for given, data in zip(request.inputs, raw, strict=True)
        ]
    return [from_values(given.name, given.datatype, _contents(given)) for given in request.inputs]


def _contents(given: Message) -> Sequence[object]:
    contents = given.contents
    return list(contents.bytes_contents) or list(contents.bool_contents)


def _parameters(parameters: Message) -> dict[str, object]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for name, value in parameters.items()
    }


def _response(call: InferCall, tensors: Sequence[Tensor]) -> Message:
    return service_pb2.ModelInferResponse(
        model_name=call.model,
        model_version="1",
        id=call.call_id,
        outputs=[
            service_pb2.ModelInferResponse.InferOutputTensor(
                name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
            )
            for tensor in tensors
        ],
        raw_output_contents=[to_raw(tensor) for tensor in tensors],
    )


def _streamed(response: Message, *, final: bool) -> Message:
    # The last piece is itself the final response, so clients that asked for an empty one after
    # it (triton_enable_empty_final_response) see the flag they wait for, as in Triton.
    response.parameters["triton_final_response"].bool_param = final
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def _failure(request: Message, error: ApiError) -> Message:
    response = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
    response.parameters["triton_final_response"].bool_param = True
    return service_pb2.ModelStreamInferResponse(
        error_message=error.message, infer_response=response
    )
