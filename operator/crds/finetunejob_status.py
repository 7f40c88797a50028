"""FineTuneJob's status: what its user reads while it runs and afterwards."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, Conditions


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
    skipped_samples: Annotated[
        int | None, Field(description="Samples left out, as they gave no finite gradient.")
    ] = None
    tokens_per_second: Annotated[float | None, Field(description="Current speed.")] = None
    mfu_ratio: Annotated[
        float | None, Field(description="That speed over that of the devices' peak FLOP/s.")
    ] = None
    budget_spent: Annotated[
        Literal["maxHours", "maxTokens"] | None,
        Field(description="What part of the budget ended it before its last step."),
    ] = None
    eta_seconds: Annotated[int | None, Field(description="Seconds left at this speed.")] = None
    eta: Annotated[
        str | None, Field(max_length=32, description="The same for people, such as 4m10s.")
    ] = None


class Metrics(ApiModel):
    """The latest measurements."""

    loss: Annotated[float | None, Field(description="Training loss.")] = None
    eval_loss: Annotated[float | None, Field(description="Loss on the held-out data.")] = None
    learning_rate: Annotated[float | None, Field(description="Current learning rate.")] = None
    reward: Annotated[float | None, Field(description="Mean reward of a step's answers.")] = None
    kl: Annotated[float | None, Field(description="Drift from the base model per token.")] = None


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
    copies: Annotated[list[str] | None, Field(max_length=8, description="Where else it is.")] = None


class SuiteResult(ApiModel):
    """The outcome of one evaluation suite."""

    suite: Annotated[str, Field(max_length=63, description="Name of the suite.")]
    base: Annotated[float | None, Field(description="Value of the base model.")] = None
    candidate: Annotated[float | None, Field(description="Value of the result.")] = None
    regression_ratio: Annotated[
        float | None, Field(description="How much worse the result is; negative is better.")
    ] = None
    samples: Annotated[int | None, Field(description="Held-out examples asked.")] = None
    passed: Annotated[bool, Field(description="Whether the result may be promoted.")]


class PromotionStatus(ApiModel):
    """How far the promotion is."""

    served_as: Annotated[
        str | None, Field(max_length=255, description="The `model` of requests that get it.")
    ] = None
    ready_replicas: Annotated[int | None, Field(description="Replicas that serve it.")] = None
    replicas: Annotated[int | None, Field(description="Replicas that should.")] = None
    approved_by: Annotated[
        str | None, Field(max_length=253, description="Who approved, as they said.")
    ] = None
    approved_at: Annotated[
        str | None, Field(max_length=64, description="When the operator saw it.")
    ] = None
    on_trial_since: Annotated[
        str | None,
        Field(
            description="Since when its requests are watched; not there before and after.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None


class LendingStatus(ApiModel):
    """The devices the job got, and gave back."""

    nodes: Annotated[
        list[str] | None,
        Field(max_length=64, description="Where its pods run; none while it waits."),
    ] = None
    replica: Annotated[
        str | None,
        Field(max_length=253, description="The pod whose weights it has, in mode Loan."),
    ] = None
    crashes: Annotated[
        int | None, Field(description="Runs that had crashed before the one there.")
    ] = None
    preemptions: Annotated[int, Field(description="Times it had to leave.")] = 0
    last_yield_seconds: Annotated[float | None, Field(description="How long that took.")] = None
    slowest_yield_seconds: Annotated[
        float | None, Field(description="Longest; above its promise it gets no spare capacity.")
    ] = None


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
    workers: Annotated[int | None, Field(description="Pods that train in this run.")] = None
    restarts: Annotated[
        int | None, Field(description="Runs that ended in a crash and were started again.")
    ] = None
    lending: Annotated[
        LendingStatus | None, Field(description="The devices it got and gave back.")
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
