"""A fine-tune job's pods and ConfigMaps, one set per generation. Pure."""

from __future__ import annotations

import json

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.finetunejob import KIND
from mizzen.operator.desired import pods
from mizzen.operator.desired.labels import (
    ADMIN_PORT,
    GENERATION,
    HOSTNAME,
    JOB,
    KUEUE_QUEUE,
    PREEMPTIONS,
    RANK,
    RESTARTS,
    ROLE,
    ROLE_TRAINER,
    base_labels,
    owner_reference,
)
from mizzen.operator.desired.sources import CLAIM_ROOT, claim_mount, claim_volume
from mizzen.operator.desired.train_config import CONFIG_MAP_ROOT, Job, build_train_config

CONTAINER = "trainer"
JOB_FILE_FOLDER = "/etc/mizzen/job"
# Longer than any commit of a checkpoint: a kubelet's kill before it would lose the newest steps.
_GRACE_S = 120


def generation_name(job: str, generation: int) -> str:
    """Return what the ConfigMap of a generation is called; its pods add their rank."""
    return f"{job}-g{generation}"


def artifact_uri(path: str) -> str:
    """Return where an artifact is, from its path inside the trainer's pod."""
    return f"pvc://{path.removeprefix(f'{CLAIM_ROOT}/')}"


def build_config_map(job: Job, generation: int) -> Json:
    """Return the ConfigMap with one generation's job.json; it never changes."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, generation_name(job.name, generation), generation),
        "immutable": True,
        "data": {"job.json": json.dumps(build_train_config(job, generation), indent=1)},
    }


def build_trainer_pod(
    job: Job,
    generation: int,
    *,
    crashes: int,
    preemptions: int = 0,
    hostname: str = "",
    image: str,
    pull_policy: str,
) -> Json:
    """Return the pod of rank 0 of one generation; `crashes` is what it has to remember.

    `hostname` is the node whose devices it was given, empty where the scheduler chooses.
    """
    name = generation_name(job.name, generation)
    metadata = _metadata(job, f"{name}-0", generation)
    metadata["labels"][RANK] = "0"
    metadata["annotations"] = {RESTARTS: str(crashes), PREEMPTIONS: str(preemptions)}
    if job.spec.queue:
        metadata["labels"][KUEUE_QUEUE] = job.spec.queue
    pod: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            # A generation ends with its pods; the next one is ours to start.
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": _GRACE_S,
            "securityContext": pods.pod_security(),
            "containers": [_container(job, image, pull_policy)],
            "volumes": [
                {"name": "job", "configMap": {"name": name}},
                *pods.scratch_volumes(),
                pods.admin_token_volume(),
                *map(claim_volume, job.claims),
                *(
                    {"name": f"data-{index}", "configMap": {"name": config_map}}
                    for index, config_map in enumerate(job.config_maps)
                ),
            ],
        },
    }
    pod = pods.with_patch(pod, job.spec.pod_template_patch)
    if hostname:
        pod["spec"]["nodeSelector"] = {**pod["spec"].get("nodeSelector", {}), HOSTNAME: hostname}
    return pod


def _container(job: Job, image: str, pull_policy: str) -> Json:
    accelerator = job.spec.resources.accelerator
    resources: Json = {"requests": dict(pods.DEFAULT_REQUESTS)}
    if accelerator.is_gpu:
        resources["limits"] = {accelerator.resource: str(accelerator.count or 1)}
    return {
        "name": CONTAINER,
        "image": image,
        "imagePullPolicy": pull_policy,
        "command": ["mizzen"],
        "args": ["train", "--config", f"{JOB_FILE_FOLDER}/job.json"],
        "ports": [{"name": "admin", "containerPort": ADMIN_PORT}],
        "livenessProbe": {
            "httpGet": {"path": "/healthz", "port": "admin"},
            "initialDelaySeconds": 60,
            "periodSeconds": 20,
            "timeoutSeconds": 10,
            "failureThreshold": 6,
        },
        "resources": resources,
        "securityContext": pods.container_security(),
        "volumeMounts": [
            {"name": "job", "mountPath": JOB_FILE_FOLDER, "readOnly": True},
            *pods.scratch_mounts(),
            pods.admin_token_mount(),
            *(claim_mount(claim, read_only=False) for claim in job.claims),
            *(
                {"name": f"data-{index}", "mountPath": f"{CONFIG_MAP_ROOT}/{name}",
                 "readOnly": True}
                for index, name in enumerate(job.config_maps)
            ),
        ],
    }  # fmt: skip


def _metadata(job: Job, name: str, generation: int) -> Json:
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": {
            **base_labels(name="finetunejob", instance=job.name, component="training"),
            JOB: job.name,
            ROLE: ROLE_TRAINER,
            GENERATION: str(generation),
        },
        "ownerReferences": [owner_reference(KIND, name=job.name, uid=job.uid)],
    }
