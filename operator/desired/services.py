"""The address of a served model, and the budget that keeps node drains from emptying it."""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels


def build_service(deployment: str, *, namespace: str, owner: Json) -> Json:
    """Return the Service of the replicas' leaders.

    Headless (docs/adr/0005): its name resolves to the leaders. Its EndpointSlices inherit the
    labels; the gateway finds them by `mizzen.dev/deployment`.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": child_metadata(deployment, deployment, namespace=namespace, owner=owner),
        "spec": {
            "clusterIP": "None",
            "selector": {labels.DEPLOYMENT: deployment, labels.RANK: "0"},
            "ports": [
                {"name": "http", "port": labels.HTTP_PORT, "targetPort": "http"},
                {"name": "grpc", "port": labels.GRPC_PORT, "targetPort": "grpc"},
            ],
        },
    }


def build_disruption_budget(
    deployment: str, *, namespace: str, owner: Json, replicas: int, nodes: int
) -> Json:
    """Return the budget that lets one pod go at a time, and a broken one at any time."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": child_metadata(deployment, deployment, namespace=namespace, owner=owner),
        "spec": {
            "minAvailable": replicas * nodes - 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": {labels.DEPLOYMENT: deployment}},
        },
    }


def child_metadata(name: str, deployment: str, *, namespace: str, owner: Json) -> Json:
    """Return the metadata of a deployment's child."""
    return {
        "name": name,
        "namespace": namespace,
        "labels": labels.deployment_labels(deployment),
        "ownerReferences": [owner],
    }
