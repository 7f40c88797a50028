"""A fine-tune job's pods and ConfigMaps, one set per generation. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.finetunejob import KIND
from mizzen.operator.desired import pods
from mizzen.operator.desired.labels import (
    ADMIN_PORT,
    GENERATION,
    GROUP_SIZE,
    HOSTNAME,
    JOB,
    PREEMPTIONS,
    RANK,
    RANKS_PORT,
    RESTARTS,
    ROLE,
    ROLE_TRAINER,
    TENSOR,
    base_labels,
    owner_reference,
)
from mizzen.operator.desired.queues import in_queue
from mizzen.operator.desired.sources import CLAIM_ROOT, claim_mount, claim_volume
from mizzen.operator.desired.train_config import CONFIG_MAP_ROOT, Job, build_train_config
from mizzen.operator.desired.workers import worker_environment, workers_name

CONTAINER = "trainer"
JOB_FILE_FOLDER = "/etc/mizzen/job"
# Longer than any commit of a checkpoint: a kubelet's kill before it would lose the newest steps.
_GRACE_S = 120


def generation_name(job: str, generation: int) -> str:
    """Return what the ConfigMap of a generation is called; its pods add their rank."""
    return f"{job}-g{generation}"


def artifact_uri(path: str) -> str:
    """Return where an artifact is, from its path inside the trainer's pod."""
    return f"pvc://{path.removeprefix(f'{CLAIM_ROOT}/')}" if path.startswith("/") else path


def build_config_map(job: Job, generation: int, *, workers: int) -> Json:
    """Return the ConfigMap with one generation's job.json; it never changes."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, generation_name(job.name, generation), generation),
        "immutable": True,
        "data": {"job.json": json.dumps(build_train_config(job, generation, workers), indent=1)},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One pod of a generation; `crashes` and `preemptions` are what it has to remember."""

    generation: int
    workers: int
    rank: int = 0
    crashes: int = 0
    preemptions: int = 0
    hostname: str = ""  # the node whose devices it was given; empty: the scheduler chooses


def build_trainer_pod(job: Job, worker: Worker, *, image: str, pull_policy: str) -> Json:
    """Return the pod of one worker."""
    name = generation_name(job.name, worker.generation)
    metadata = _metadata(job, f"{name}-{worker.rank}", worker.generation)
    metadata["labels"][RANK] = str(worker.rank)
    metadata["annotations"] = {
        RESTARTS: str(worker.crashes),
        PREEMPTIONS: str(worker.preemptions),
        GROUP_SIZE: str(worker.workers),
        TENSOR: str(job.spec.parallelism.tensor),
    }
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
            "containers": [_container(job, worker, image, pull_policy)],
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
    if worker.workers > 1:
        # By these the leader has a name before it is ready.
        pod["spec"] |= {"hostname": metadata["name"], "subdomain": workers_name(job)}
    if job.spec.queue:
        pod = in_queue(pod, job.spec.queue, group=name, pods=worker.workers)
    pod = pods.with_patch(pod, job.spec.pod_template_patch)
    # Which nodes an affinity allows is the scheduler's to say.
    if worker.hostname and not pod["spec"].get("affinity"):
        selector = pod["spec"].get("nodeSelector", {})
        pod["spec"]["nodeSelector"] = {**selector, HOSTNAME: worker.hostname}
    return pod


def _container(job: Job, worker: Worker, image: str, pull_policy: str) -> Json:
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
        "env": _env(job, worker),
        "ports": _ports(worker),
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


def _ports(worker: Worker) -> list[Json]:
    ports: list[Json] = [{"name": "admin", "containerPort": ADMIN_PORT}]
    if worker.workers > 1:
        ports.append({"name": "ranks", "containerPort": RANKS_PORT})
    return ports


def _env(job: Job, worker: Worker) -> list[Json]:
    env: list[Json] = []
    if worker.workers > 1:
        leader = f"{generation_name(job.name, worker.generation)}-0"
        env += worker_environment(job, rank=worker.rank, leader=leader)
    judge = job.spec.evaluation.judge if job.spec.evaluation else None
    asked = {"MIZZEN_JUDGE_API_KEY": judge, "MIZZEN_TEACHER_API_KEY": job.spec.distill}
    for name, whom in asked.items():
        if whom is not None and whom.api_key_secret is not None:
            key = {"name": whom.api_key_secret, "key": "api-key"}
            env.append({"name": name, "valueFrom": {"secretKeyRef": key}})
    return env


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
