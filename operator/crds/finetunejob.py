"""FineTuneJob: one way to make a better model, as its user writes and reads it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mizzen.operator.crds.common import (
    ApiModel,
    DnsLabel,
    PodTemplatePatch,
    address_rules,
    cel,
)
from mizzen.operator.crds.finetunejob_status import FineTuneJobStatus
from mizzen.operator.crds.promotion import Promotion
from mizzen.operator.crds.training_backend import Backend, backend_rules
from mizzen.operator.crds.training_data import BaseModelRef, ClaimFolder, Dataset, Processing
from mizzen.operator.crds.training_loan import Mode, loan_rules
from mizzen.operator.crds.training_methods import (
    COMPUTED,
    METHOD_SECTIONS,
    Distill,
    Dpo,
    Evaluation,
    Merge,
    Method,
    Prune,
    Quantize,
    Rl,
    method_rules,
)
from mizzen.operator.crds.training_run import (
    Budget,
    Checkpointing,
    Failure,
    JobResources,
    SpareCapacity,
    TensorParallelism,
    Workers,
)

KIND = "FineTuneJob"
PLURAL = "finetunejobs"


class Adaptation(ApiModel):
    """Which weights are trained."""

    type: Annotated[
        Literal["full", "lora", "qlora"],
        Field(
            description="lora trains a small adapter beside the frozen model, qlora beside a "
            "quantized one, full every weight."
        ),
    ] = "lora"
    rank: Annotated[
        int, Field(ge=1, le=256, description="Rank of the adapter's matrices (lora).")
    ] = 16
    alpha: Annotated[
        float,
        Field(gt=0, le=4096, description="Scale of the adapter, divided by the rank (lora)."),
    ] = 32
    dropout: Annotated[
        float, Field(ge=0, lt=1, description="Dropout before the adapter (lora).")
    ] = 0.0
    targets: Annotated[
        Literal["all-linear", "attention", "mlp"],
        Field(description="Which linear layers get an adapter (lora)."),
    ] = "all-linear"
    quantization: Annotated[
        Literal["int8", "int4"], Field(description="How the frozen weights are kept (qlora).")
    ] = "int8"


class Hyperparameters(ApiModel):
    """Settings of the optimisation."""

    epochs: Annotated[
        float, Field(gt=0, le=1000, description="Passes over the data; parts of one count.")
    ] = 1
    max_steps: Annotated[
        int | None, Field(ge=1, description="Stop after this many steps, whatever the epochs.")
    ] = None
    batch_size: Annotated[
        int, Field(ge=1, le=65536, description="Sequences per optimiser step.")
    ] = 8
    micro_batch: Annotated[
        int | None,
        Field(
            ge=1,
            le=65536,
            description="Sequences computed at once; the trainer chooses when left out.",
        ),
    ] = None
    learning_rate: Annotated[float, Field(gt=0, le=1, description="Highest learning rate.")] = 2e-4
    warmup_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps in which the rate rises.")
    ] = 0.03
    weight_decay: Annotated[float, Field(ge=0, le=1, description="AdamW's weight decay.")] = 0.0
    scheduler: Annotated[
        Literal["cosine", "linear", "constant"],
        Field(description="How the learning rate falls after the warm-up."),
    ] = "cosine"
    grad_clip: Annotated[
        float, Field(ge=0, le=1000, description="Largest norm of the gradient; 0 switches it off.")
    ] = 1.0
    seed: Annotated[int, Field(ge=0, le=4294967295, description="Seed of data and dropout.")] = 0


class Output(ApiModel):
    """Where the result goes."""

    uri: Annotated[
        ClaimFolder | None,
        Field(
            description="Folder for the result, pvc://CLAIM/PATH; by default adapters/NAME or "
            "models/NAME on the base model's claim."
        ),
    ] = None
    oci_layout: Annotated[
        ClaimFolder | None,
        Field(description="Folder, pvc://CLAIM/PATH, whose OCI image layout gets a copy."),
    ] = None
    s3: Annotated[
        str | None,
        Field(
            max_length=512,
            description="Bucket that gets a copy, s3://BUCKET/PREFIX; AWS_* variables come from "
            "podTemplatePatch.env.",
            json_schema_extra=address_rules(
                "s3://[a-z0-9][-a-z0-9.]*[a-z0-9]/.+",
                "output.s3 must look like s3://BUCKET/PREFIX",
            ),
        ),
    ] = None


_CANNOT_CHANGE = (
    "cannot change (only suspend, workers, parallelism, spareCapacity and priority can)."
)


def _unchanged(*fields: str) -> tuple[dict[str, str], ...]:
    """Return the rules that keep these fields, which every job has, as they were."""
    return tuple(
        cel(f"self.{name} == oldSelf.{name}", f"spec.{name} {_CANNOT_CHANGE}") for name in fields
    )


def _unchanged_sections() -> dict[str, str]:
    """Return the rule for the methods' own settings: all but dpo's come and go with the method."""
    kept = (
        f"(!has(self.{name}) || has(oldSelf.{name}) && self.{name} == oldSelf.{name})"
        for name in METHOD_SECTIONS
    )
    names = ", ".join(METHOD_SECTIONS)
    return cel(
        f"has(self.dpo) == has(oldSelf.dpo) && {' && '.join(kept)}", f"{names} {_CANNOT_CHANGE}"
    )


def _unchanged_if_any(*fields: str) -> tuple[dict[str, str], ...]:
    """Return the rules by which these fields neither change nor come nor go."""
    return tuple(
        cel(
            f"has(self.{name}) == has(oldSelf.{name}) && "
            f"(!has(self.{name}) || self.{name} == oldSelf.{name})",
            f"spec.{name} {_CANNOT_CHANGE}",
        )
        for name in fields
    )


class FineTuneJobSpec(ApiModel):
    """What should be trained, on what, and where the result goes."""

    rules = (
        *_unchanged(
            "backend", "method", "adaptation", "baseModel", "processing", "hyperparameters"
        ),
        *_unchanged("checkpoint", "resources", "failure", "roles", "mode"),
        _unchanged_sections(),
        *_unchanged_if_any(
            "dataset", "evaluation", "output", "promotion", "budget", "podTemplatePatch"
        ),
        *_unchanged_if_any("queue"),
        *method_rules(),
        *backend_rules(),
        *loan_rules(),
        cel(
            "self.checkpoint.keepBest == 0 || self.processing.holdoutRatio > 0.0",
            "checkpoint.keepBest needs processing.holdoutRatio above 0.",
        ),
        cel(
            "!self.spareCapacity.enabled || self.resources.accelerator.resource != 'none'",
            "spareCapacity needs resources.accelerator.resource: only devices are lent.",
        ),
        cel(
            "!self.spareCapacity.enabled || !has(self.queue)",
            "Set spareCapacity.enabled or queue: with a queue it is Kueue that lends.",
        ),
        cel(
            "!has(self.promotion) || self.promotion.strategy != 'HotLoadAdapter' || "
            "self.adaptation.type != 'full'",
            "promotion.strategy HotLoadAdapter needs adaptation.type lora or qlora.",
        ),
        cel(
            f"self.workers.max == 1 || !(self.method in {list(COMPUTED)})",
            f"workers.max above 1 is for methods that train, not for {', '.join(COMPUTED)}.",
        ),
        cel(
            "self.workers.max == 1 || !has(self.rl) || !has(self.rl.rollout)",
            "rl.rollout needs workers.max 1.",
        ),
        cel(
            "self.roles != 'Ray' || self.method in ['grpo', 'ppo']",
            "roles Ray needs method grpo or ppo.",
        ),
        cel(
            "self.workers.min % self.parallelism.tensor == 0 && "
            "self.workers.max % self.parallelism.tensor == 0",
            "workers.min and workers.max must be multiples of parallelism.tensor.",
        ),
        cel(
            "self.parallelism.tensor == 1 || self.roles != 'Ray'",
            "roles Ray needs parallelism.tensor 1.",
        ),
        cel(
            "has(self.output) && has(self.output.uri) || has(self.baseModel.deployment) || "
            "self.baseModel.source.startsWith('pvc://')",
            "Set output.uri, since the base model is on no claim the result could lie on.",
        ),
        cel(
            "!has(self.evaluation) || self.evaluation.suites.size() == 0 || "
            "self.processing.holdoutRatio > 0.0",
            "evaluation.suites needs processing.holdoutRatio above 0.",
        ),
    )

    method: Method = "sft"
    backend: Backend = "Mizzen"
    mode: Mode = "Pod"
    dpo: Annotated[Dpo | None, Field(description="Settings of method dpo.")] = None
    distill: Annotated[Distill | None, Field(description="Settings of method distill.")] = None
    merge: Annotated[Merge | None, Field(description="Settings of method merge.")] = None
    quantize: Annotated[Quantize | None, Field(description="Settings of method quantize.")] = None
    prune: Annotated[Prune | None, Field(description="Settings of method prune.")] = None
    rl: Annotated[Rl | None, Field(description="Settings of methods grpo and ppo.")] = None
    adaptation: Annotated[Adaptation, Field(description="Which weights are trained.")] = (
        Adaptation()
    )
    base_model: Annotated[BaseModelRef, Field(description="The model to start from.")]
    dataset: Annotated[
        list[Dataset],
        Field(
            default_factory=list,
            max_length=32,
            description="Examples to learn from, or to calibrate and measure with.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ]
    processing: Annotated[
        Processing, Field(description="How examples become training sequences.")
    ] = Processing()
    hyperparameters: Annotated[
        Hyperparameters, Field(description="Settings of the optimisation.")
    ] = Hyperparameters()
    checkpoint: Annotated[Checkpointing, Field(description="When progress is saved.")] = (
        Checkpointing()
    )
    budget: Annotated[
        Budget | None, Field(description="What it may use; then it ends with what it has.")
    ] = None
    workers: Annotated[Workers, Field(description="How many pods train together.")] = Workers()
    roles: Annotated[
        Literal["Auto", "InProcess", "Ray"],
        Field(
            description="Who draws answers, judges them and knows the base (grpo, ppo): the "
            "trainer, or processes beside it. Auto: these, in a single pod with room for them."
        ),
    ] = "Auto"
    parallelism: Annotated[
        TensorParallelism, Field(description="How many workers share one copy of the model.")
    ] = TensorParallelism()
    resources: Annotated[JobResources, Field(description="What the trainer pod asks for.")] = (
        JobResources()
    )
    spare_capacity: Annotated[
        SpareCapacity, Field(description="Run on devices that serving leaves idle.")
    ] = SpareCapacity()
    priority: Annotated[
        int, Field(ge=-1000, le=1000, description="Jobs with more get devices first.")
    ] = 0
    queue: Annotated[
        DnsLabel | None,
        Field(description="Kueue's LocalQueue that admits the trainer pods instead."),
    ] = None
    failure: Annotated[Failure, Field(description="What happens when the trainer crashes.")] = (
        Failure()
    )
    evaluation: Annotated[
        Evaluation | None, Field(description="The gate between training and promotion.")
    ] = None
    output: Annotated[Output | None, Field(description="Where the result goes.")] = None
    promotion: Annotated[
        Promotion | None, Field(description="What happens with a result that passed.")
    ] = None
    suspend: Annotated[
        bool,
        Field(description="Stop at a checkpoint and free the devices; false goes on from there."),
    ] = False
    pod_template_patch: Annotated[
        PodTemplatePatch | None, Field(description="Additions to the trainer pod.")
    ] = None


class FineTuneJob(ApiModel):
    """One training run: data and base model in, an evaluated and published result out.

    Its spec cannot change once it exists, but for suspend, workers, parallelism, spareCapacity
    and priority.
    """

    rules: ClassVar[tuple[dict[str, str], ...]] = (
        cel(
            "self.metadata.name.size() <= 40 && "
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "The name must have at most 40 lower-case letters, digits and dashes and begin with a "
            "letter.",
        ),
    )

    spec: Annotated[FineTuneJobSpec, Field(description="What should be trained, and on what.")]
    status: Annotated[
        FineTuneJobStatus | None,
        Field(description="What the operator observed. Written by the operator alone."),
    ] = None
