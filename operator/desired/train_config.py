"""What a job's trainer is told: a FineTuneJob as job.json. Pure.

The trainer knows nothing of Kubernetes: addresses become paths of mounted volumes here, and the
fields that need no such change keep their names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.crds.training_data import Dataset
from mizzen.operator.crds.training_methods import COMPUTED, METHOD_SECTIONS
from mizzen.operator.desired.labels import ADMIN_PORT
from mizzen.operator.desired.sources import CLAIM_ROOT, claims_of, locate

CONFIG_MAP_ROOT = "/mnt/configmap"
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
    created_at: str = ""  # feedback that came later is another job's
    judge: Json | None = None  # where the judge of winRate is, as the trainer is told
    teacher: Json | None = None  # where a deployment that teaches is
    rollout: Json | None = None  # where the replicas are that draw a policy's answers

    @property
    def output_uri(self) -> str:
        """The folder for results: as written, else beside the base model."""
        if self.spec.output is not None and self.spec.output.uri is not None:
            return self.spec.output.uri
        return f"pvc://{locate(self.base_source).claim}/{self.result}s/{self.name}"

    @property
    def result(self) -> str:
        """What the job leaves behind: an `adapter` beside its base, or a whole `model`."""
        is_trained = self.spec.method not in COMPUTED
        return "adapter" if is_trained and self.spec.adaptation.type != "full" else "model"

    @property
    def output_claim(self) -> str:
        """The claim that results and checkpoints are written to."""
        claim = locate(self.output_uri).claim
        assert claim is not None, "the CRD lets only pvc:// outputs in"
        return claim

    @property
    def claims(self) -> tuple[str, ...]:
        """Every claim the trainer mounts, sorted."""
        datasets = (a for d in self.spec.dataset if (a := address_of(d)).startswith("pvc://"))
        others = _addresses(method_options(self.spec))
        layout = self.spec.output.oci_layout if self.spec.output else None
        written = [self.output_uri, *([layout] if layout else [])]
        return claims_of(map(locate, [self.base_source, *written, *datasets, *others]))

    @property
    def config_maps(self) -> tuple[str, ...]:
        """Every ConfigMap that holds a dataset, sorted."""
        return tuple(sorted({name for d in self.spec.dataset if (name := config_map_of(d)[0])}))


def address_of(dataset: Dataset) -> str:
    """Return where a dataset is: its file, or the folder of a deployment's feedback."""
    if dataset.feedback_ref is not None:
        return f"{dataset.feedback_ref.folder}/{dataset.feedback_ref.deployment}"
    assert dataset.uri is not None, "the CRD lets no dataset without a place in"
    return dataset.uri


def config_map_of(dataset: Dataset) -> tuple[str, str]:
    """Return name and key of a dataset's ConfigMap, empty strings for any other source."""
    address = address_of(dataset)
    if not address.startswith("configMap://"):
        return "", ""
    name, _, key = address.removeprefix("configMap://").partition("/")
    return name, key


def build_train_config(job: Job, generation: int, workers: int) -> Json:
    """Return job.json as the trainer's settings model reads it."""
    spec = job.spec
    targets = spec.adaptation.targets
    return {
        "job": f"{job.namespace}/{job.name}",
        "backend": spec.backend,
        "method": spec.method,
        "adaptation": {
            **spec.adaptation.model_dump(),
            "targets": _TARGETS.get(targets, targets),
        },
        "base_model": locate(job.base_source).path,
        "datasets": [_dataset(dataset, job.created_at) for dataset in spec.dataset],
        "processing": {
            "loss_on": spec.processing.loss_on,
            "max_seq_len": spec.processing.max_seq_len,
            "holdout_ratio": spec.processing.holdout_ratio,
            "engine": spec.processing.engine,
        },
        "hyperparameters": spec.hyperparameters.model_dump(exclude_none=True),
        **_as_paths(method_options(spec)),
        **_distill(job),
        **_rl(job),
        "failure": {"hang_timeout_s": spec.failure.hang_timeout_seconds},
        "budget": spec.budget.model_dump() if spec.budget else {},
        "checkpoint": {
            "directory": checkpoint_folder(job),
            "every_steps": spec.checkpoint.every_steps,
            "every_seconds": spec.checkpoint.every_seconds,
            "keep_last": spec.checkpoint.keep_last,
            "keep_best": spec.checkpoint.keep_best,
        },
        "output": _output(job),
        "evaluation": _evaluation(job),
        "roles": spec.roles,
        "workers": workers,
        "parallelism": spec.parallelism.model_dump(),
        "generation": generation,
        "admin_port": ADMIN_PORT,
    }


def _output(job: Job) -> Json:
    written: Json = {"directory": locate(job.output_uri).path, "kind": job.result}
    if (output := job.spec.output) is not None:
        if output.oci_layout:
            written["oci_layout"] = locate(output.oci_layout).path
        if output.s3:
            written["s3"] = output.s3
    return written


def _evaluation(job: Job) -> Json:
    evaluation = job.spec.evaluation
    if evaluation is None:
        return {}
    suites = [suite.model_dump(exclude_none=True) for suite in evaluation.suites]
    judge = {"judge": job.judge} if job.judge else {}
    return {"on_fail": evaluation.on_fail, "suites": suites, **judge}


def _distill(job: Job) -> Json:
    distill = job.spec.distill
    if distill is None:
        return {}
    section = distill.model_dump(exclude={"deployment", "api_key_secret"}, exclude_none=True)
    served = {"served": job.teacher} if job.teacher else {}
    return {"distill": {**_as_paths(section), **served}}


def _rl(job: Job) -> Json:
    rl = job.spec.rl
    if rl is None:
        return {}
    section = rl.model_dump(exclude={"rollout"}, exclude_none=True)
    replicas = {"rollout": job.rollout} if job.rollout else {}
    return {"rl": {**_as_paths(section), **replicas}}


def method_options(spec: FineTuneJobSpec) -> Json:
    """Return the settings that only some methods have, as they are written in the job."""
    sections = ((name, getattr(spec, name)) for name in METHOD_SECTIONS)
    return {
        name: section.model_dump(exclude_none=True)
        for name, section in sections
        if section is not None
    }


def _is_address(value: object) -> bool:
    return isinstance(value, str) and value.startswith(("pvc://", "file://"))


def _as_paths(value: Any) -> Any:
    """Return the same document with every model's address replaced by its path in the pod."""
    if isinstance(value, dict):
        return {name: _as_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_as_paths(inner) for inner in value]
    return locate(value).path if _is_address(value) else value


def _addresses(value: Any) -> Iterator[str]:
    """Yield every model's address in a document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _addresses(inner)
    elif _is_address(value):
        yield value


def checkpoint_folder(job: Job) -> str:
    """Return where a job's checkpoints are."""
    # The uid keeps a job of the same name from going on where a deleted one stopped.
    return f"{CLAIM_ROOT}/{job.output_claim}/jobs/{job.namespace}-{job.name}-{job.uid[:8]}"


def _dataset(dataset: Dataset, created_at: str) -> Json:
    entry: Json = {"name": dataset.name, "weight": dataset.weight, "format": dataset.format}
    if dataset.sha256:
        entry["sha256"] = dataset.sha256
    name, key = config_map_of(dataset)
    address = address_of(dataset)
    if name:
        entry["path"] = f"{CONFIG_MAP_ROOT}/{name}/{key}"
    elif dataset.feedback_ref is not None:
        entry |= {"feedback": locate(address).path, "until": created_at}
    elif address.startswith(("http://", "https://")):
        entry["url"] = address
    else:
        entry["path"] = locate(address).path
    return entry
