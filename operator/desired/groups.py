"""What makes several pods one replica: names for each other, a way to each other, one start.

The runtime's side of it is `runtime/parallel/nodes.py`.
"""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels
from mizzen.operator.desired.services import child_metadata


def ranks_name(deployment: str, uid: str) -> str:
    """Return what the objects are called by which the pods of groups find each other.

    With a part of the uid: `NAME-ranks` alone could be another deployment's Service.
    """
    return f"{deployment}-ranks-{uid[:8]}"


def build_ranks_service(deployment: str, *, namespace: str, owner: Json) -> Json:
    """Return the Service that gives every pod of a group a name, ready or not."""
    name = ranks_name(deployment, owner["uid"])
    metadata = child_metadata(name, deployment, namespace=namespace, owner=owner)
    # Its EndpointSlices inherit the labels: by the usual one a gateway would take every pod of a
    # group, ready or not, for one that takes requests.
    names = {key: value for key, value in metadata["labels"].items() if key != labels.DEPLOYMENT}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata | {"labels": names | {labels.RANKS_OF: deployment}},
        "spec": {
            "clusterIP": "None",
            # They meet before they are ready, and become ready by it.
            "publishNotReadyAddresses": True,
            "selector": {labels.DEPLOYMENT: deployment},
            "ports": [{"name": "ranks", "port": labels.RANKS_PORT, "targetPort": "ranks"}],
        },
    }


def build_ranks_policy(deployment: str, *, namespace: str, owner: Json) -> Json:
    """Return the policy that lets the pods of a deployment's groups reach each other.

    On every port: collectives choose theirs. Nobody else is let in there by any policy of ours.
    """
    name = ranks_name(deployment, owner["uid"])
    pods = {"matchLabels": {labels.DEPLOYMENT: deployment, labels.ROLE: labels.ROLE_RUNTIME}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": child_metadata(name, deployment, namespace=namespace, owner=owner),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    }


def group_flags(*, nodes: int, rank: int, leader: str, subdomain: str, namespace: str) -> list[str]:
    """Return what a pod needs to know to join the others; `leader` is the name of pod 0."""
    flags = {
        "--nnodes": str(nodes),
        "--node-rank": str(rank),
        "--master-addr": f"{leader}.{subdomain}.{namespace}.svc",
        "--master-port": str(labels.RANKS_PORT),
    }
    return [word for pair in flags.items() for word in pair]


def group_spec(*, name: str, subdomain: str) -> Json:
    """Return the fields of a pod's spec that lone pods do not have."""
    return {"hostname": name, "subdomain": subdomain}
