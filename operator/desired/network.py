"""What one namespace needs so that pods of ours can run in it: a token, and who may reach them.

Both are shared by all our resources in the namespace, so none of them owns these two objects.
"""

from __future__ import annotations

import base64

from mizzen.operator.crds.common import Json
from mizzen.operator.desired import labels

NETWORK_POLICY = "mizzen"


def build_admin_secret(namespace: str, *, token: str) -> Json:
    """Return the namespace's copy of the admin token."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(labels.ADMIN_SECRET, namespace),
        "type": "Opaque",
        "data": {labels.ADMIN_TOKEN_KEY: base64.b64encode(token.encode()).decode()},
    }


def build_network_policy(namespace: str, *, operator_namespace: str) -> Json:
    """Return the policy: users reach the serving ports, only operator and gateway the others.

    The pods of a group reach each other by a policy of their deployment (`services.py`).
    """
    ours = {"app.kubernetes.io/part-of": "mizzen"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(NETWORK_POLICY, namespace),
        "spec": {
            "podSelector": {"matchLabels": {labels.MANAGED_BY: labels.OPERATOR}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "ports": [
                        {"protocol": "TCP", "port": labels.HTTP_PORT},
                        {"protocol": "TCP", "port": labels.GRPC_PORT},
                    ]
                },
                {
                    "from": [
                        {
                            "namespaceSelector": {
                                "matchLabels": {"kubernetes.io/metadata.name": operator_namespace}
                            },
                            "podSelector": {"matchLabels": ours},
                        },
                    ]
                },
            ],
        },
    }


def _metadata(name: str, namespace: str) -> Json:
    return {
        "name": name,
        "namespace": namespace,
        "labels": labels.base_labels(name="mizzen", instance="mizzen", component="namespace"),
    }
