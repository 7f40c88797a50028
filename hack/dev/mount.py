"""Mounts the working tree into our pods by admission policy: the product needs no dev switch.

Only for a cluster whose node is this machine: the folder is mounted from the node's disk.
"""

from __future__ import annotations

import json
from pathlib import Path

POLICY = "mizzen-dev-source"
VOLUME = "mizzen-source"
_MOUNT = "/opt/mizzen-source"
_LABELS = {"app.kubernetes.io/part-of": "mizzen"}

# Shows, without being made, whether the policy is in force.
PROBE = json.dumps(
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": POLICY, "labels": _LABELS},
        "spec": {
            "securityContext": {
                "runAsNonRoot": True, "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {"name": "none", "image": "none", "securityContext": {
                    "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
            ],
        },
    }
)  # fmt: skip


def build_policy(source: Path) -> str:
    """Return the MutatingAdmissionPolicy and its binding as one JSON list.

    The policy adds a read-only hostPath volume, its mount and PYTHONPATH to every pod that carries
    our part-of label; lists with map keys are merged, so nothing else of the pod changes.
    """
    expression = f"""Object{{spec: Object.spec{{
      volumes: [Object.spec.volumes{{name: "{VOLUME}",
        hostPath: Object.spec.volumes.hostPath{{
          path: {json.dumps(str(source))}, type: "Directory"}}}}],
      containers: object.spec.containers.map(c, Object.spec.containers{{name: c.name,
        env: [Object.spec.containers.env{{name: "PYTHONPATH", value: "{_MOUNT}"}}],
        volumeMounts: [Object.spec.containers.volumeMounts{{
          name: "{VOLUME}", mountPath: "{_MOUNT}", readOnly: true}}]}})
    }}}}"""
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "matchConstraints": {
                "objectSelector": {"matchLabels": _LABELS},
                "resourceRules": [
                    {
                        "apiGroups": [""],
                        "apiVersions": ["v1"],
                        "resources": ["pods"],
                        "operations": ["CREATE"],
                    }
                ],
            },
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "mutations": [
                {
                    "patchType": "ApplyConfiguration",
                    "applyConfiguration": {"expression": expression},
                }
            ],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": POLICY},
        "spec": {"policyName": POLICY},
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [policy, binding]})
