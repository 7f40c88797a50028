"""A fine-tune job's pods and their configuration, one set per generation. Pure.

The trainer knows nothing of Kubernetes: sources become paths of mounted volumes here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.finetunejob import KIND, Dataset, FineTuneJobSpec
from mizzen.operator.desired import pods
from mizzen.operator.desired.labels import (
    ADMIN_PORT,
    GENERATION,
    JOB,
    RANK,
    RESTARTS,
    ROLE,
    ROLE_TRAINER,
    base_labels,
    owner_reference,
)
from mizzen.operator.desired.sources import (
    CLAIM_ROOT,
    claim_mount,
    claim_volume,
    claims_of,
    locate,
)

CONTAINER = "trainer"
JOB_FILE_FOLDER = "/etc/mizzen/job"
_CONFIG_MAP_ROOT = "/mnt/configmap"
# Longer than any commit of a checkpoint: a kubelet's kill before it would lose the newest steps.
_GRACE_S = 120
_TARGETS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True, slots=True)
class Job:
    """A FineTuneJob with its base model found: everything its pods follow from."""

    namespace: str
    name: str
    uid: str
    spec: FineTuneJobSpec
    base_source: str

    @property
    def output_uri(self) -> str:
        """The folder for results: as written, else beside the base model."""
        if self.spec.output is not None:
            return self.spec.output.uri
        kind = "adapters" if self.spec.adaptation.type == "lora" else "models"
        return f"pvc://{locate(self.base_source).claim}/{kind}/{self.name}"

    @property
    def output_claim(self) -> str:
        """The claim that results and checkpoints are written to."""
        claim = locate(self.output_uri).claim
        assert claim is not None, "the CRD lets only pvc:// outputs in"
        return claim

    @property
    def claims(self) -> tuple[str, ...]:
        """Every claim the trainer mounts, sorted."""
        datasets = (d.uri for d in self.spec.dataset if d.uri.startswith("pvc://"))
        return claims_of(map(locate, [self.base_source, self.output_uri, *datasets]))

    @property
    def config_maps(self) -> tuple[str, ...]:
        """Every ConfigMap that holds a dataset, sorted."""
        return tuple(sorted({name for d in self.spec.dataset if (name := config_map_of(d)[0])}))


def config_map_of(dataset: Dataset) -> tuple[str, str]:
    """Return name and key of a dataset's ConfigMap, empty strings for any other source."""
    if not dataset.uri.startswith("configMap://"):
        return "", ""
    name, _, key = dataset.uri.removeprefix("configMap://").partition("/")
    return name, key


def generation_name(job: str, generation: int) -> str:
    """Return what the ConfigMap of a generation is called; its pods add their rank."""
    return f"{job}-g{generation}"


def artifact_uri(path: str) -> str:
    """Return where an artifact is, from its path inside the trainer's pod."""
    return f"pvc://{path.removeprefix(f'{CLAIM_ROOT}/')}"


def build_train_config(job: Job, generation: int) -> Json:
    """Return job.json as the trainer's settings model reads it."""
    spec = job.spec
    targets = spec.adaptation.targets
    hyperparameters = {
        "epochs": spec.hyperparameters.epochs,
        "max_steps": spec.hyperparameters.max_steps,
        "batch_size": spec.hyperparameters.batch_size,
        "micro_batch": spec.hyperparameters.micro_batch,
        "learning_rate": spec.hyperparameters.learning_rate,
        "warmup_ratio": spec.hyperparameters.warmup_ratio,
        "weight_decay": spec.hyperparameters.weight_decay,
        "scheduler": spec.hyperparameters.scheduler,
        "grad_clip": spec.hyperparameters.grad_clip,
        "seed": spec.hyperparameters.seed,
    }
    return {
        "job": f"{job.namespace}/{job.name}",
        "method": spec.method,
        "adaptation": {
            "type": spec.adaptation.type,
            "rank": spec.adaptation.rank,
            "alpha": spec.adaptation.alpha,
            "dropout": spec.adaptation.dropout,
            "targets": _TARGETS.get(targets, targets),
        },
        "base_model": locate(job.base_source).path,
        "datasets": [_dataset(dataset) for dataset in spec.dataset],
        "processing": {
            "loss_on": spec.processing.loss_on,
            "max_seq_len": spec.processing.max_seq_len,
            "holdout_ratio": spec.processing.holdout_ratio,
        },
        "hyperparameters": {k: v for k, v in hyperparameters.items() if v is not None},
        "checkpoint": {
            "directory": _checkpoint_folder(job),
            "every_steps": spec.checkpoint.every_steps,
            "every_seconds": spec.checkpoint.every_seconds,
            "keep_last": spec.checkpoint.keep_last,
        },
        "output": {
            "directory": locate(job.output_uri).path,
            "kind": "adapter" if spec.adaptation.type == "lora" else "model",
        },
        "evaluation": {
            "suites": [
                {
                    "name": suite.name,
                    "type": suite.type,
                    "max_regression_ratio": suite.max_regression_ratio,
                }
                for suite in (spec.evaluation.suites if spec.evaluation else [])
            ]
        },
        "world_size": 1,
        "generation": generation,
        "admin_port": ADMIN_PORT,
    }


def _checkpoint_folder(job: Job) -> str:
    # The uid keeps a job of the same name from going on where a deleted one stopped.
    return f"{CLAIM_ROOT}/{job.output_claim}/jobs/{job.namespace}-{job.name}-{job.uid[:8]}"


def _dataset(dataset: Dataset) -> Json:
    entry: Json = {"name": dataset.name, "weight": dataset.weight, "format": dataset.format}
    if dataset.sha256:
        entry["sha256"] = dataset.sha256
    name, key = config_map_of(dataset)
    if name:
        entry["path"] = f"{_CONFIG_MAP_ROOT}/{name}/{key}"
    elif dataset.uri.startswith(("http://", "https://")):
        entry["url"] = dataset.uri
    else:
        entry["path"] = locate(dataset.uri).path
    return entry


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
    job: Job, generation: int, *, crashes: int, image: str, pull_policy: str
) -> Json:
    """Return the pod of rank 0 of one generation; `crashes` is what it has to remember."""
    name = generation_name(job.name, generation)
    metadata = _metadata(job, f"{name}-0", generation)
    metadata["labels"][RANK] = "0"
    metadata["annotations"] = {RESTARTS: str(crashes)}
    pod = {
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
    return pods.with_patch(pod, job.spec.pod_template_patch)


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
                {"name": f"data-{index}", "mountPath": f"{_CONFIG_MAP_ROOT}/{name}",
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
