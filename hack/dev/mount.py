"""Mounts the working tree into our pods by admission policy: the product needs no dev switch.

Only for a cluster whose node is this machine: the folder is mounted from the node's disk.
"""

from __future__ import annotations

import json
from pathlib import Path

_NAME = "mizzen-dev-source"
_MOUNT = "/opt/mizzen-source"


def build_policy(source: Path) -> str:
    """Return the MutatingAdmissionPolicy and its binding as one JSON list.

    The policy adds a read-only hostPath volume, its mount and PYTHONPATH to every pod that carries
    our part-of label; lists with map keys are merged, so nothing else of the pod changes.
    """
    expression = f"""Object{{spec: Object.spec{{
      volumes: [Object.spec.volumes{{name: "mizzen-source",
        hostPath: Object.spec.volumes.hostPath{{
          path: {json.dumps(str(source))}, type: "Directory"}}}}],
      containers: object.spec.containers.map(c, Object.spec.containers{{name: c.name,
        env: [Object.spec.containers.env{{name: "PYTHONPATH", value: "{_MOUNT}"}}],
        volumeMounts: [Object.spec.containers.volumeMounts{{
          name: "mizzen-source", mountPath: "{_MOUNT}", readOnly: true}}]}})
    }}}}"""
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": _NAME},
        "spec": {
            "matchConstraints": {
                "objectSelector": {"matchLabels": {"app.kubernetes.io/part-of": "mizzen"}},
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
        "metadata": {"name": _NAME},
        "spec": {"policyName": _NAME},
    }
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": [policy, binding]})
