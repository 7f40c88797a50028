"""The gateway's OpenAPI description: what it passes on, in the words of the runtime that answers.

Generated, because the gateway's image has nothing of the runtime's server to read it from.
"""

import json
from collections.abc import Iterator
from typing import Any

from hack.generate.openapi_batches import batch_paths
from mizzen.runtime.config import ServeConfig
from mizzen.runtime.gateway.app import PROXIED
from mizzen.runtime.server.app import user_routes
from mizzen.runtime.server.metrics import Metrics
from mizzen.runtime.server.openapi import describe
from mizzen.runtime.server.service import Service

PATH = "runtime/gateway/openapi.json"
PATHS = ("/openapi.json", "/v1/models", "/v1/models/{model}", *PROXIED)


def files() -> dict[str, str]:
    """Return path and content of the description."""
    return {PATH: json.dumps(gateway_description(), indent=1) + "\n"}


def gateway_description() -> dict[str, Any]:
    """Return the runtime's description without what the gateway does not offer."""
    service = Service(ServeConfig(model="any"), Metrics("any"))
    document = describe(user_routes(service))
    document["paths"] = {path: document["paths"][path] for path in PATHS}
    keys = document["paths"]["/v1/models"]["get"]["security"]
    document["paths"] |= batch_paths(security=keys)
    schemas = document["components"]["schemas"]
    used = set(_names(document["paths"], schemas))
    document["components"]["schemas"] = {
        name: schema for name, schema in schemas.items() if name in used
    }
    return document


def _names(node: object, schemas: dict[str, Any]) -> Iterator[str]:
    """Yield the name of every schema that `node` refers to, and of those they refer to."""
    if isinstance(node, list):
        for entry in node:
            yield from _names(entry, schemas)
    if isinstance(node, dict):
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            yield name
            yield from _names(schemas[name], schemas)
        for entry in node.values():
            yield from _names(entry, schemas)
