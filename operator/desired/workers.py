"""What lets the pods of a training generation find and reach each other. Pure.

The trainer's side of it is `runtime/train/workers.py`.
"""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.finetunejob import KIND
from mizzen.operator.desired import labels
from mizzen.operator.desired.train_config import Job


def workers_name(job: Job) -> str:
    """Return what the Service and the policy are called.

    With a part of the uid: `NAME-workers` alone could be somebody else's Service.
    """
    return f"{job.name}-workers-{job.uid[:8]}"


def build_workers_service(job: Job) -> Json:
    """Return the Service that gives every worker a name, ready or not."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {labels.JOB: job.name, labels.ROLE: labels.ROLE_TRAINER},
            "ports": [{"name": "ranks", "port": labels.RANKS_PORT, "targetPort": "ranks"}],
        },
    }


def build_workers_policy(job: Job) -> Json:
    """Return the policy that lets a job's workers reach each other.

    On every port: collectives choose theirs.
    """
    pods = {"matchLabels": {labels.JOB: job.name, labels.ROLE: labels.ROLE_TRAINER}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(job),
        "spec": {
            "podSelector": pods,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": pods}]}],
        },
    }


def worker_environment(job: Job, *, rank: int, leader: str) -> list[Json]:
    """Return what a worker is told of the others; `leader` is the name of rank 0's pod."""
    address = f"{leader}.{workers_name(job)}.{job.namespace}.svc"
    variables = {
        "MIZZEN_NODE_RANK": str(rank),
        "MIZZEN_MASTER_ADDR": address,
        "MIZZEN_MASTER_PORT": str(labels.RANKS_PORT),
    }
    return [{"name": name, "value": value} for name, value in variables.items()]


def _metadata(job: Job) -> Json:
    return {
        "name": workers_name(job),
        "namespace": job.namespace,
        "labels": {
            **labels.base_labels(name="finetunejob", instance=job.name, component="training"),
            labels.JOB: job.name,
        },
        "ownerReferences": [labels.owner_reference(KIND, name=job.name, uid=job.uid)],
    }
