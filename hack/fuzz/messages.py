"""gRPC calls as bytes, nearly right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from hack.fuzz.odd import odd_bytes
from hack.fuzz.requests import MODEL, sampling

_SERVICE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/"
_NAMES = (MODEL, MODEL, MODEL, "", "nobody", "x" * 20_000, "é" * 3000, "a\0b", "../..")


@dataclass(frozen=True, slots=True)
class GrpcCall:
    """A call and the messages it sends."""

    method: str
    messages: tuple[bytes, ...]
    is_stream: bool = False


def odd_call(rng: Random) -> GrpcCall:
    """Return a call with something wrong in it, as a message or as its bytes."""
    kind = rng.choice(_KINDS)
    if kind == "Stream":
        count = rng.choice((1, 1, 2, 5))
        messages = tuple(odd_bytes(rng, _infer(rng)) for _ in range(count))
        return GrpcCall(f"{_SERVICE}ModelStreamInfer", messages, is_stream=True)
    if kind == "Check":
        name = rng.choice(("", "inference.GRPCInferenceService", "nobody")).encode()
        right = b"\x0a" + bytes((len(name),)) + name if name else b""
        return GrpcCall(f"{_HEALTH}Check", (odd_bytes(rng, right),))
    right = _infer(rng) if kind == "ModelInfer" else _SIMPLE[kind](rng).SerializeToString()
    return GrpcCall(_SERVICE + kind, (odd_bytes(rng, right),))


def _infer(rng: Random) -> bytes:
    request = pb.ModelInferRequest(model_name=rng.choice(_NAMES), id=rng.choice(("", "1", "é")))
    texts = {"text_input": "hello", "sampling_parameters": json.dumps(sampling(rng))}
    if rng.random() < 0.3:
        texts[rng.choice(_NAMES)] = ""
    is_raw = rng.random() < 0.5
    for name, text in texts.items():
        given = request.inputs.add(name=name, datatype=rng.choice(_DATATYPES), shape=[1])
        value = text.encode(errors="replace")
        if is_raw:
            blob = len(value).to_bytes(4, "little") + value
            request.raw_input_contents.append(odd_bytes(rng, blob) if rng.random() < 0.2 else blob)
        else:
            given.contents.bytes_contents.append(value)
    if rng.random() < 0.5:
        flag = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
        if is_raw:
            request.raw_input_contents.append(b"\1")
        else:
            flag.contents.bool_contents.append(True)
    if rng.random() < 0.3:
        name = rng.choice(("timeout", "priority", "sequence_id", "é"))
        request.parameters[name].CopyFrom(rng.choice(_PARAMETERS))
    if rng.random() < 0.2:
        request.outputs.add(name=rng.choice(("text_output", "finish_reason", *_NAMES)))
    return request.SerializeToString()


_DATATYPES = (*("BYTES",) * 12, "BOOL", "FP32", "", "x" * 9000)
_PARAMETERS = (
    pb.InferParameter(int64_param=-1),
    pb.InferParameter(int64_param=2**62),
    pb.InferParameter(int64_param=30_000_000),
    pb.InferParameter(string_param="x" * 9000),
    pb.InferParameter(double_param=float("nan")),
    pb.InferParameter(bool_param=True),
    pb.InferParameter(),
)


def _load(rng: Random) -> Any:
    request = pb.RepositoryModelLoadRequest(model_name=rng.choice((*_NAMES, "a", "b")))
    path = rng.choice(("/mnt/pvc/a", "/mnt/pvc/\0", "", "/", "x" * 9000, "/mnt/pvc/" + "y" * 3000))
    request.parameters["path"].string_param = path
    if rng.random() < 0.3:
        config = json.dumps({"parameters": {"path": {"string_value": path}}})
        del request.parameters["path"]
        request.parameters["config"].string_param = config
    return request


_SIMPLE = {
    "ServerLive": lambda rng: pb.ServerLiveRequest(),
    "ServerReady": lambda rng: pb.ServerReadyRequest(),
    "ServerMetadata": lambda rng: pb.ServerMetadataRequest(),
    "ModelReady": lambda rng: pb.ModelReadyRequest(name=rng.choice(_NAMES)),
    "ModelMetadata": lambda rng: pb.ModelMetadataRequest(name=rng.choice(_NAMES)),
    "ModelConfig": lambda rng: pb.ModelConfigRequest(name=rng.choice(_NAMES), version="x" * 9000),
    "ModelStatistics": lambda rng: pb.ModelStatisticsRequest(name=rng.choice(_NAMES)),
    "RepositoryIndex": lambda rng: pb.RepositoryIndexRequest(ready=rng.random() < 0.5),
    "RepositoryModelLoad": _load,
    "RepositoryModelUnload": lambda rng: pb.RepositoryModelUnloadRequest(
        model_name=rng.choice(_NAMES)
    ),
}
_KINDS = ("Stream", "Stream", *("ModelInfer",) * 3, "Check", *_SIMPLE)
