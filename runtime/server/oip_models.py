"""What the Open Inference Protocol says about the server and its models, as JSON documents.

gRPC has the same documents as messages; they are parsed from these, so the two cannot differ.
"""

from importlib.metadata import PackageNotFoundError, version

from mizzen.runtime.server.oip_infer import INPUTS, OUTPUTS
from mizzen.runtime.server.service import ModelUse, Service

Json = dict[str, object]

_CONFIG_TYPES = {"BYTES": "TYPE_STRING", "BOOL": "TYPE_BOOL", "UINT32": "TYPE_UINT32"}


def server_metadata() -> Json:
    """Name, version and extensions of the server."""
    try:
        own = version("mizzen")
    except PackageNotFoundError:
        own = "0"  # run from a source tree
    extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
    return {"name": "mizzen", "version": own, "extensions": extensions}


def model_metadata(name: str) -> Json:
    """Inputs and outputs of a model."""
    return {
        "name": name,
        "versions": ["1"],
        "platform": "mizzen",
        "inputs": [
            {"name": key, "datatype": datatype, "shape": [1]}
            for key, (datatype, _) in INPUTS.items()
        ],
        "outputs": [
            {"name": key, "datatype": datatype, "shape": [1]} for key, datatype in OUTPUTS.items()
        ],
    }


def model_config(name: str) -> Json:
    """The same, as a Triton model configuration."""
    return {
        "name": name,
        "platform": "",
        "backend": "mizzen",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,  # batching is the engine's own, across requests
        "input": [
            {"name": key, "data_type": _CONFIG_TYPES[kind], "dims": [1], "optional": optional}
            for key, (kind, optional) in INPUTS.items()
        ],
        "output": [
            {"name": key, "data_type": _CONFIG_TYPES[kind], "dims": [1]}
            for key, kind in OUTPUTS.items()
        ],
        "model_transaction_policy": {"decoupled": True},
    }


def model_statistics(service: Service, names: list[str]) -> Json:
    """How often each model was used, and how long that took in all."""
    unused = ModelUse()
    return {"model_stats": [_statistics(name, service.uses.get(name, unused)) for name in names]}


def _statistics(name: str, use: ModelUse) -> Json:
    nothing = {"count": 0, "ns": 0}
    return {
        "name": name,
        "version": "1",
        "last_inference": use.last_used_ms,
        "inference_count": use.succeeded,
        "execution_count": use.succeeded,
        "inference_stats": {
            "success": {"count": use.succeeded, "ns": use.succeeded_ns},
            "fail": {"count": use.failed, "ns": use.failed_ns},
            "queue": nothing,
            "compute_input": nothing,
            "compute_infer": {"count": use.succeeded, "ns": use.succeeded_ns},
            "compute_output": nothing,
        },
        "batch_stats": [],
    }


def repository_index(service: Service, *, ready_only: bool) -> list[Json]:
    """The base model and every adapter, with the reason where one could not be loaded."""
    base = "READY" if service.engine_or_none else "LOADING"
    states = {name: ("READY", "") for name in service.model_names()}
    states[service.served_name] = (base, "")
    for name, message in service.adapter_errors.items():
        states.setdefault(name, ("UNAVAILABLE", message))
    return [
        {"name": name, "version": "1", "state": state, "reason": reason}
        for name, (state, reason) in states.items()
        if state == "READY" or not ready_only
    ]
