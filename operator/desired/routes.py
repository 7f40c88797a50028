"""A deployment's place in the cluster's Gateway API: an InferencePool and an HTTPRoute.

Field names are those of sigs.k8s.io/gateway-api (HTTPRoute v1) and
sigs.k8s.io/gateway-api-inference-extension (InferencePool v1).
"""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.desired.services import child_metadata
from mizzen.operator.desired.serving import Serving

POOL = "InferencePool"
ROUTE = "HTTPRoute"
API_VERSIONS = {POOL: "inference.networking.k8s.io/v1", ROUTE: "gateway.networking.k8s.io/v1"}

# The extension's body-based routing copies a request's `model` into it; no route can read a body.
MODEL_HEADER = "X-Gateway-Model-Name"
_MATCHES_PER_RULE = 8  # as many as every v1 release accepts


@dataclass(frozen=True, slots=True)
class ParentGateway:
    """The Gateway that routes attach to; an empty namespace is the deployment's own."""

    name: str
    namespace: str = ""
    section: str = ""  # the one listener to attach to, or all


@dataclass(frozen=True, slots=True)
class EndpointPicker:
    """The Service, beside each deployment, that chooses among its replicas."""

    name: str  # {deployment} in it stands for the deployment's name
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRouting:
    """What an installation wants of the Gateway API, and what the cluster has of it."""

    gateway: ParentGateway | None = None
    picker: EndpointPicker | None = None
    kinds: frozenset[str] = frozenset()  # of API_VERSIONS, those the API server knows


def build_routes(serving: Serving, routing: GatewayRouting) -> tuple[Json, ...]:
    """Return the pool and the route, each where it is wanted and its kind exists."""
    routes: list[Json] = []
    has_pool = routing.picker is not None and POOL in routing.kinds
    if routing.picker is not None and has_pool:
        routes.append(_pool(serving, routing.picker))
    if routing.gateway is not None and ROUTE in routing.kinds:
        routes.append(_route(serving, routing.gateway, has_pool=has_pool))
    return tuple(routes)


def _pool(serving: Serving, picker: EndpointPicker) -> Json:
    return {
        "apiVersion": API_VERSIONS[POOL],
        "kind": POOL,
        "metadata": _metadata(serving),
        "spec": {
            "selector": {"matchLabels": {labels.DEPLOYMENT: serving.name, labels.RANK: "0"}},
            "targetPorts": [{"number": labels.HTTP_PORT}],
            "endpointPickerRef": {
                "name": picker.name.replace("{deployment}", serving.name),
                "port": {"number": picker.port},
            },
        },
    }


def _route(serving: Serving, gateway: ParentGateway, *, has_pool: bool) -> Json:
    optional = {"namespace": gateway.namespace, "sectionName": gateway.section}
    parent = {"name": gateway.name} | {key: value for key, value in optional.items() if value}
    backend = _pool_backend(serving.name) if has_pool else _service_backend(serving.name)
    names = _model_names(serving)
    return {
        "apiVersion": API_VERSIONS[ROUTE],
        "kind": ROUTE,
        "metadata": _metadata(serving),
        "spec": {
            "parentRefs": [parent],
            "rules": [
                {
                    "matches": [_match(name) for name in names[first : first + _MATCHES_PER_RULE]],
                    "backendRefs": [backend],
                }
                for first in range(0, len(names), _MATCHES_PER_RULE)
            ],
        },
    }


def _pool_backend(name: str) -> Json:
    return {"group": API_VERSIONS[POOL].partition("/")[0], "kind": POOL, "name": name}


def _service_backend(name: str) -> Json:
    return {"kind": "Service", "name": name, "port": labels.HTTP_PORT}


def _match(model: str) -> Json:
    return {
        "path": {"type": "PathPrefix", "value": "/v1"},
        "headers": [{"type": "Exact", "name": MODEL_HEADER, "value": model}],
    }


def _model_names(serving: Serving) -> list[str]:
    """Return what clients call the model and, after a colon, each of its adapters."""
    served = serving.spec.model.served_name or serving.name
    return [served, *(f"{served}:{adapter.name}" for adapter in serving.adapters)]


def _metadata(serving: Serving) -> Json:
    return child_metadata(
        serving.name, serving.name, namespace=serving.namespace, owner=serving.owner
    )
