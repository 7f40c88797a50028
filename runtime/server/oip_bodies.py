"""The JSON bodies of the Open Inference Protocol, checked once at the border."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Parameters = dict[str, Any]


class _Lenient(BaseModel):
    # Clients and proxies add fields of other servers' extensions; the protocol lets them.
    model_config = ConfigDict(extra="ignore")


class InputParameters(_Lenient):
    """How an input is sent."""

    binary_data_size: int | None = Field(None, ge=0)


class InputTensor(_Lenient):
    """A tensor given, its data here or in the bytes behind the JSON."""

    name: str
    datatype: str
    shape: list[int] = Field(default_factory=list)
    data: list[Any] | None = None
    parameters: InputParameters = Field(default_factory=InputParameters)


class OutputParameters(_Lenient):
    """How an output is wanted."""

    model_config = ConfigDict(extra="allow")  # `wanted_output` looks at what is not served

    binary_data: bool | None = None


class OutputTensor(_Lenient):
    """A tensor wanted."""

    name: str
    parameters: OutputParameters = Field(default_factory=OutputParameters)


class InferBody(_Lenient):
    """Body of POST /v2/models/MODEL/infer, or the part of it that is JSON."""

    id: str = ""
    inputs: list[InputTensor]
    outputs: list[OutputTensor] = Field(default_factory=list)
    parameters: Parameters = Field(default_factory=dict)


class IndexBody(_Lenient):
    """Body of POST /v2/repository/index."""

    ready: bool = False


class RepositoryBody(_Lenient):
    """Body of the calls that load and unload."""

    parameters: Parameters = Field(default_factory=dict)
