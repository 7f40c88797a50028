"""The messages of the Open Inference Protocol over gRPC, out of tritonclient.

Its package imports its clients as well, and they numpy and its linear algebra: 20 MB of each
server's process that only a client needs. So the package stands there empty while the modules that
the compiler of protocol buffers has written are imported, which ask for nothing but each other.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

_PACKAGE = "tritonclient.grpc"


def _import(*names: str) -> list[Any]:
    spec = find_spec(_PACKAGE)
    if spec is None or _PACKAGE in sys.modules:
        return [import_module(f"{_PACKAGE}.{name}") for name in names]
    sys.modules[_PACKAGE] = module_from_spec(spec)
    try:
        return [import_module(f"{_PACKAGE}.{name}") for name in names]
    finally:
        del sys.modules[_PACKAGE]  # whoever wants a client in this process gets the whole package


model_config_pb2, service_pb2, service_pb2_grpc = _import(
    "model_config_pb2", "service_pb2", "service_pb2_grpc"
)
