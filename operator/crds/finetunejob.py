"""FineTuneJob: one way to make a better model, as its user writes and reads it."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mizzen.operator.crds.common import (
    NO_PARENT_RULE,
    Accelerator,
    ApiModel,
    Conditions,
    DnsLabel,
    ModelSource,
    PodTemplatePatch,
    cel,
    rules,
)

KIND = "FineTuneJob"
PLURAL = "finetunejobs"


class Adaptation(ApiModel):
    """Which weights are trained."""

    type: Annotated[
        Literal["full", "lora"],
        Field(
            description="lora trains a small adapter beside the frozen model; full trains every "
            "weight and writes a whole model."
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


class BaseModelRef(ApiModel):
    """The model to start from."""

    rules = (
        cel(
            "has(self.deployment) != has(self.source)",
            "Set exactly one of baseModel.deployment and baseModel.source.",
        ),
    )

    deployment: Annotated[
        DnsLabel | None,
        Field(description="An LLMDeployment of this namespace: its spec.model.source is used."),
    ] = None
    source: Annotated[
        ModelSource | None,
        Field(description="A model path: pvc://CLAIM/PATH or file:///PATH."),
    ] = None


class Dataset(ApiModel):
    """One source of examples."""

    name: Annotated[DnsLabel, Field(description="Name of the source in status and logs.")]
    uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1024,
            description="configMap://NAME/KEY, pvc://CLAIM/PATH or an http(s) address of a JSONL "
            "file.",
            json_schema_extra=rules(
                cel(
                    r"self.matches('^(configMap://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+"
                    r"|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+|https?://.+)$')",
                    "A dataset's uri must look like configMap://NAME/KEY, pvc://CLAIM/PATH or "
                    "https://HOST/PATH.",
                ),
                NO_PARENT_RULE,
            ),
        ),
    ]
    format: Annotated[
        Literal["auto", "messages", "promptCompletion"],
        Field(
            description="Shape of a line: {messages: [...]} or {prompt, completion}; auto looks "
            "at the first line."
        ),
    ] = "auto"
    weight: Annotated[
        float,
        Field(gt=0, le=1000, description="How often its examples are drawn, beside the others'."),
    ] = 1.0
    sha256: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="Expected digest of the file; the job fails when it differs.",
        ),
    ] = None


class Processing(ApiModel):
    """How examples become training sequences."""

    loss_on: Annotated[
        Literal["assistant", "all"],
        Field(description="Learn the assistant's tokens only, or every token."),
    ] = "assistant"
    max_seq_len: Annotated[
        int, Field(ge=16, le=131072, description="Longest sequence in tokens; longer are cut.")
    ] = 1024
    holdout_ratio: Annotated[
        float,
        Field(ge=0, le=0.5, description="Share of the examples kept back for evaluation."),
    ] = 0.05


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
            description="Sequences computed at once; lower it when memory runs out. Chosen by the "
            "trainer when left out.",
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


class Checkpointing(ApiModel):
    """When progress is saved."""

    every_steps: Annotated[int, Field(ge=1, description="Save after this many steps.")] = 50
    every_seconds: Annotated[
        int, Field(ge=1, description="Save after this many seconds, if steps are slow.")
    ] = 300
    keep_last: Annotated[int, Field(ge=1, le=100, description="Checkpoints kept.")] = 2


class JobResources(ApiModel):
    """What the trainer pod asks for."""

    accelerator: Annotated[Accelerator, Field(description="The devices of the trainer pod.")] = (
        Accelerator()
    )


class Failure(ApiModel):
    """What happens when the trainer crashes."""

    backoff_limit: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Crashes in a row without a new checkpoint before the job fails.",
        ),
    ] = 6


class EvaluationSuite(ApiModel):
    """One test the result must pass."""

    name: Annotated[DnsLabel, Field(description="Name of the suite in status.")]
    type: Annotated[
        Literal["perplexity"],
        Field(description="perplexity: on the held-out examples, result against base model."),
    ] = "perplexity"
    max_regression_ratio: Annotated[
        float,
        Field(
            ge=-1,
            le=10,
            description="How much worse than the base model the result may be: 0.02 allows 2 "
            "percent, -0.05 demands 5 percent better.",
        ),
    ] = 0.0


class Evaluation(ApiModel):
    """The gate between training and publication."""

    suites: Annotated[
        list[EvaluationSuite],
        Field(
            max_length=16,
            description="Tests the result must pass before it is promoted.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ]


class Output(ApiModel):
    """Where the result goes."""

    uri: Annotated[
        str,
        Field(
            min_length=1,
            max_length=512,
            description="Folder for the result: pvc://CLAIM/PATH.",
            json_schema_extra=rules(
                cel(
                    r"self.matches('^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+$')",
                    "output.uri must look like pvc://CLAIM/PATH.",
                ),
                NO_PARENT_RULE,
            ),
        ),
    ]


class Promotion(ApiModel):
    """What happens with a result that passed."""

    rules = (
        cel(
            "self.strategy == 'None' || has(self.deployment)",
            "promotion.strategy HotLoadAdapter needs promotion.deployment, the LLMDeployment that "
            "should serve the adapter.",
        ),
    )

    deployment: Annotated[
        DnsLabel | None,
        Field(description="The LLMDeployment of this namespace that gets the result."),
    ] = None
    strategy: Annotated[
        Literal["None", "HotLoadAdapter"],
        Field(
            description="HotLoadAdapter loads the adapter on every replica without a restart, "
            "under the job's name, as long as the job exists. None only publishes."
        ),
    ] = "HotLoadAdapter"


def _unchanged(*fields: str) -> tuple[dict[str, str], ...]:
    """Return the rules that keep these fields as they were, each with its own message."""
    return tuple(
        cel(
            f"has(self.{name}) == has(oldSelf.{name}) && "
            f"(!has(self.{name}) || self.{name} == oldSelf.{name})",
            f"spec.{name} cannot change once the job exists (only spec.suspend can): delete the "
            "job and create it anew.",
        )
        for name in fields
    )


class FineTuneJobSpec(ApiModel):
    """What should be trained, on what, and where the result goes."""

    rules = (
        *_unchanged(
            "method",
            "adaptation",
            "baseModel",
            "dataset",
            "processing",
            "hyperparameters",
            "checkpoint",
            "resources",
            "failure",
            "evaluation",
            "output",
            "promotion",
            "podTemplatePatch",
        ),
        cel(
            "!has(self.promotion) || self.promotion.strategy != 'HotLoadAdapter' || "
            "self.adaptation.type == 'lora'",
            "promotion.strategy HotLoadAdapter needs adaptation.type lora: a fully trained model "
            "is not an adapter.",
        ),
        cel(
            "has(self.output) || has(self.baseModel.deployment) || "
            "self.baseModel.source.startsWith('pvc://')",
            "Set output.uri: a base model outside a volume claim leaves no default place for the "
            "result.",
        ),
        cel(
            "!has(self.evaluation) || self.evaluation.suites.size() == 0 || "
            "self.processing.holdoutRatio > 0.0",
            "evaluation.suites needs processing.holdoutRatio above 0: there would be nothing to "
            "evaluate on.",
        ),
    )

    method: Annotated[
        Literal["sft"], Field(description="sft: supervised fine-tuning on example answers.")
    ] = "sft"
    adaptation: Annotated[Adaptation, Field(description="Which weights are trained.")] = (
        Adaptation()
    )
    base_model: Annotated[BaseModelRef, Field(description="The model to start from.")]
    dataset: Annotated[
        list[Dataset],
        Field(
            min_length=1,
            max_length=32,
            description="The examples to learn from.",
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
    resources: Annotated[JobResources, Field(description="What the trainer pod asks for.")] = (
        JobResources()
    )
    failure: Annotated[Failure, Field(description="What happens when the trainer crashes.")] = (
        Failure()
    )
    evaluation: Annotated[
        Evaluation | None, Field(description="The gate between training and promotion.")
    ] = None
    output: Annotated[
        Output | None,
        Field(
            description="Where the result goes. By default adapters/NAME, or models/NAME for full "
            "training, on the base model's claim."
        ),
    ] = None
    promotion: Annotated[
        Promotion | None, Field(description="What happens with a result that passed.")
    ] = None
    suspend: Annotated[
        bool,
        Field(
            description="true stops the trainer at a checkpoint and frees its devices; false goes "
            "on from there. The one field that can change."
        ),
    ] = False
    pod_template_patch: Annotated[
        PodTemplatePatch | None, Field(description="Additions to the trainer pod.")
    ] = None


class Progress(ApiModel):
    """How far the training is."""

    step: Annotated[int, Field(description="Optimiser steps done.")] = 0
    total_steps: Annotated[int | None, Field(description="Steps there will be.")] = None
    steps: Annotated[
        str | None, Field(max_length=64, description="Both in one, such as 12/40.")
    ] = None
    percent: Annotated[int | None, Field(description="Share of the steps done.")] = None
    epoch: Annotated[float | None, Field(description="Passes over the data so far.")] = None
    tokens: Annotated[int | None, Field(description="Tokens trained on.")] = None
    tokens_per_second: Annotated[float | None, Field(description="Current speed.")] = None
    eta_seconds: Annotated[int | None, Field(description="Seconds left at this speed.")] = None
    eta: Annotated[
        str | None, Field(max_length=32, description="The same for people, such as 4m10s.")
    ] = None


class Metrics(ApiModel):
    """The latest measurements."""

    loss: Annotated[float | None, Field(description="Training loss.")] = None
    eval_loss: Annotated[float | None, Field(description="Loss on the held-out data.")] = None
    learning_rate: Annotated[float | None, Field(description="Current learning rate.")] = None


class CheckpointStatus(ApiModel):
    """The last saved state."""

    step: Annotated[int, Field(description="Step it was taken at.")]
    committed_at: Annotated[
        str | None, Field(max_length=64, description="When it was committed.")
    ] = None


class Artifact(ApiModel):
    """The published result."""

    uri: Annotated[str, Field(max_length=1024, description="Where it is.")]
    digest: Annotated[str, Field(max_length=128, description="Digest of its files.")]
    bytes: Annotated[int | None, Field(description="Its size.")] = None
    kind: Annotated[Literal["adapter", "model"], Field(description="What it is.")]


class SuiteResult(ApiModel):
    """The outcome of one evaluation suite."""

    suite: Annotated[str, Field(max_length=63, description="Name of the suite.")]
    base: Annotated[float | None, Field(description="Value of the base model.")] = None
    candidate: Annotated[float | None, Field(description="Value of the result.")] = None
    regression_ratio: Annotated[
        float | None, Field(description="How much worse the result is; negative is better.")
    ] = None
    passed: Annotated[bool, Field(description="Whether the result may be promoted.")]


class PromotionStatus(ApiModel):
    """How far the promotion is."""

    adapter: Annotated[
        str | None, Field(max_length=63, description="Name of the adapter on the deployment.")
    ] = None
    ready_replicas: Annotated[int | None, Field(description="Replicas that serve it.")] = None
    replicas: Annotated[int | None, Field(description="Replicas that should.")] = None


Phase = Literal[
    "Pending",
    "Admitted",
    "Preparing",
    "Running",
    "Yielding",
    "Parked",
    "Evaluating",
    "Publishing",
    "Promoting",
    "Succeeded",
    "Failed",
    "Suspended",
]


class FineTuneJobStatus(ApiModel):
    """What the operator observed."""

    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation this status belongs to.")
    ] = None
    phase: Annotated[
        Phase | None, Field(description="One word for people; programs read the conditions.")
    ] = None
    base_model: Annotated[
        str | None, Field(max_length=512, description="The model path that is trained from.")
    ] = None
    generation: Annotated[
        int | None, Field(description="Number of the current run of the trainer pods.")
    ] = None
    restarts: Annotated[
        int | None, Field(description="Runs that ended in a crash and were started again.")
    ] = None
    progress: Annotated[Progress | None, Field(description="How far the training is.")] = None
    metrics: Annotated[Metrics | None, Field(description="The latest measurements.")] = None
    checkpoint: Annotated[CheckpointStatus | None, Field(description="The last saved state.")] = (
        None
    )
    artifact: Annotated[Artifact | None, Field(description="The published result.")] = None
    evaluation: Annotated[
        list[SuiteResult] | None,
        Field(
            max_length=16,
            description="Outcome of each evaluation suite.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["suite"],
            },
        ),
    ] = None
    promotion: Annotated[PromotionStatus | None, Field(description="How far the promotion is.")] = (
        None
    )
    conditions: Annotated[
        Conditions | None,
        Field(
            description="Ready, Accepted, Admitted, Running, Suspended, EvaluationPassed, "
            "Published, Promoted, Succeeded and Failed."
        ),
    ] = None


class FineTuneJob(ApiModel):
    """One training run: data and base model in, an evaluated and published result out.

    Its spec cannot change once it exists, but for spec.suspend.
    """

    rules: ClassVar[tuple[dict[str, str], ...]] = (
        cel(
            "self.metadata.name.size() <= 40 && "
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "The name must have at most 40 lower-case letters, digits and dashes and begin with a "
            "letter: pods and the adapter are named after it.",
        ),
    )

    spec: Annotated[FineTuneJobSpec, Field(description="What should be trained, and on what.")]
    status: Annotated[
        FineTuneJobStatus | None,
        Field(description="What the operator observed. Written by the operator alone."),
    ] = None
