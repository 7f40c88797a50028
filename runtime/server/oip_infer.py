"""One inference call: tensors in, tensors out, named as Triton's vLLM backend names them.

Knows neither HTTP nor gRPC.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from pydantic import ConfigDict, Field, ValidationError

from mizzen.runtime.engine.api import TokenOutput
from mizzen.runtime.server.errors import ApiError, from_validation, invalid
from mizzen.runtime.server.oip_tensors import Tensor
from mizzen.runtime.server.prompts import encode_text
from mizzen.runtime.server.schemas import Sampling
from mizzen.runtime.server.service import Service
from mizzen.runtime.tracing import current_span

# name -> (datatype, optional)
INPUTS: Mapping[str, tuple[str, bool]] = {
    "text_input": ("BYTES", False),
    "stream": ("BOOL", True),
    "sampling_parameters": ("BYTES", True),
    "exclude_input_in_output": ("BOOL", True),
    "return_finish_reason": ("BOOL", True),
    "return_num_input_tokens": ("BOOL", True),
    "return_num_output_tokens": ("BOOL", True),
}
OUTPUTS: Mapping[str, str] = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}


class InferSampling(Sampling):
    """The JSON in `sampling_parameters`; `lora_name` picks an adapter, as in Triton's backend."""

    # Triton's backend takes numbers as text, and its own examples send them so.
    model_config = ConfigDict(strict=False)

    lora_name: str | None = None
    n: int = Field(1, ge=1, le=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferCall:
    """A call as it came, whatever brought it."""

    model: str
    version: str
    call_id: str
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]  # empty: all
    parameters: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """A call understood: what to generate and what to answer with."""

    text: str
    prompt: tuple[int, ...]
    sampling: InferSampling
    adapter: str | None
    stream: bool
    prepend_input: bool
    outputs: tuple[str, ...]
    priority: int
    timeout_s: float | None


async def understand(service: Service, call: InferCall) -> Inference:
    """Return what a call asks for.

    Raises:
        ApiError: the model is not served, or the call's tensors are not what it takes.
    """
    current_span.get().name("text_completion", call.model)
    adapter = service.resolve(call.model)
    check_version(call.version)
    _check_names(call)
    text = _text(call.inputs, "text_input")
    sampling = _sampling(call.inputs)
    if sampling.lora_name:
        adapter = service.resolve(sampling.lora_name)
    stream = _flag(call.inputs, "stream", default=False)
    # As in Triton's backend: a whole answer repeats its prompt unless told otherwise.
    exclude = _flag(call.inputs, "exclude_input_in_output", default=stream)
    if stream and not exclude:
        raise invalid("exclude_input_in_output", "A stream cannot repeat its input.")
    prompt = await encode_text(service.engine, text, param="text_input")
    return Inference(
        text=text,
        prompt=prompt,
        sampling=sampling,
        adapter=adapter,
        stream=stream,
        prepend_input=not exclude,
        outputs=_wanted(call),
        priority=_number(call.parameters, "priority", least=-_MOST),
        timeout_s=_number(call.parameters, "timeout", least=0) / 1e6 or None,  # microseconds
    )


def check_version(version: str) -> None:
    """Raise unless `version` is the one there is, or none."""
    if version not in ("", "1"):
        raise ApiError(404, f"Version {version} does not exist; models here have version 1.")


def _check_names(call: InferCall) -> None:
    for name, tensor in call.inputs.items():
        if name not in INPUTS:
            raise invalid(name, f"Unexpected input {name!r}. Inputs: {', '.join(INPUTS)}.")
        if tensor.datatype != INPUTS[name][0]:
            raise invalid(name, f"{name}: expected datatype {INPUTS[name][0]}.")
        if len(tensor.values) != 1:
            raise invalid(name, f"{name}: expected one element, got {len(tensor.values)}.")
    if "text_input" not in call.inputs:
        raise invalid("text_input", "The input text_input is missing.")
    for name in call.outputs:
        if name not in OUTPUTS:
            raise invalid(name, f"Unexpected output {name!r}. Outputs: {', '.join(OUTPUTS)}.")
    if call.parameters.get("sequence_id") not in (None, 0, ""):
        raise invalid("sequence_id", "Sequences are not supported; send the whole prompt.")


def wanted_output(name: str, parameters: Mapping[str, object]) -> str:
    """Return the name of a wanted output.

    Raises:
        ApiError: it is wanted in a form that is not served, or at a place that is not filled.
    """
    for extension in ("classification", "shared_memory_region"):
        if parameters.get(extension):
            raise invalid(name, f"{name}: {extension} is not supported here; leave it out.")
    return name


def _text(inputs: Mapping[str, Tensor], name: str) -> str:
    value = inputs[name].values[0]
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise invalid(name, f"{name} is not valid UTF-8.") from error


def _flag(inputs: Mapping[str, Tensor], name: str, *, default: bool) -> bool:
    return bool(inputs[name].values[0]) if name in inputs else default


_MOST = 2**31 - 1


def _number(parameters: Mapping[str, object], name: str, *, least: int) -> int:
    value = parameters.get(name, 0)
    # A boolean is an int to Python, and none to the engine.
    if type(value) is int and least <= value <= _MOST:
        return value
    raise invalid(name, f"{name}: expected an integer between {least} and {_MOST}.")


def _sampling(inputs: Mapping[str, Tensor]) -> InferSampling:
    if "sampling_parameters" not in inputs:
        return InferSampling()
    try:
        return InferSampling.model_validate_json(_text(inputs, "sampling_parameters") or "{}")
    except ValidationError as error:
        answer = from_validation(error)
        raise invalid(answer.param, f"sampling_parameters: {answer.message}") from error


def _wanted(call: InferCall) -> tuple[str, ...]:
    wanted = call.outputs or tuple(OUTPUTS)
    return tuple(name for name in wanted if _flag(call.inputs, f"return_{name}", default=True))


async def run_stream(service: Service, asked: Inference) -> AsyncGenerator[TokenOutput, None]:
    """Yield the answer's outputs; those that carry nothing for the client are left out."""
    params = asked.sampling.to_params(logprobs=None, default_max_tokens=16)
    run = service.generate(
        asked.prompt,
        params,
        adapter=asked.adapter,
        priority=asked.priority,
        continues_text=True,
    )
    async with aclosing(run):
        async for output in run:
            if output.text or output.finish_reason:
                yield output


async def run_whole(service: Service, asked: Inference) -> list[Tensor]:
    """Return the whole answer's tensors.

    Raises:
        ApiError: the request failed, or the time it was given is over.
    """
    try:
        async with asyncio.timeout(asked.timeout_s), aclosing(run_stream(service, asked)) as run:
            outputs = [output async for output in run]
    except TimeoutError as error:
        raise timed_out() from error
    text = "".join([asked.text if asked.prepend_input else "", *(each.text for each in outputs)])
    return answer_tensors(asked, outputs[-1], text=text, count=outputs[-1].output_tokens)


def timed_out() -> ApiError:
    """Return the answer to a request whose own timeout is over."""
    return ApiError(504, "The request's timeout is over.", code="timeout")


def answer_tensors(asked: Inference, output: TokenOutput, *, text: str, count: int) -> list[Tensor]:
    """Return the outputs the client wants, in the order it named them."""
    values: dict[str, bytes | int] = {
        "text_output": text.encode(),
        "finish_reason": (output.finish_reason or "").encode(),
        "num_input_tokens": output.prompt_tokens,
        "num_output_tokens": count,
    }
    return [Tensor(name, OUTPUTS[name], (values[name],)) for name in asked.outputs]


def to_inputs(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return tensors by name.

    Raises:
        ApiError: a name comes twice.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    if len(by_name) != len(tensors):
        raise invalid("inputs", "An input is given twice.")
    return by_name
