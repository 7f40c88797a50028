"""How a FineTuneJob runs: where, on how many workers, how long, and what is kept."""

from typing import Annotated

from pydantic import Field

from mizzen.operator.crds.common import (
    Accelerator,
    ApiModel,
    cel,
)


class Checkpointing(ApiModel):
    """When progress is saved."""

    every_steps: Annotated[int, Field(ge=1, description="Save after this many steps.")] = 50
    every_seconds: Annotated[
        int, Field(ge=1, description="Save after this many seconds, if steps are slow.")
    ] = 300
    keep_last: Annotated[int, Field(ge=1, le=100, description="Checkpoints kept.")] = 2
    keep_best: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="How many are also kept that are best on the held-out data, measured every "
            "everySteps; the best is the result. 0: the last is.",
        ),
    ] = 0


class Budget(ApiModel):
    """What the job may use; then it ends with what it has."""

    rules = (
        cel("has(self.maxHours) || has(self.maxTokens)", "Set budget.maxHours, maxTokens or both."),
    )

    max_hours: Annotated[
        float | None, Field(gt=0, le=100000, description="Hours of training steps, over all runs.")
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Tokens trained on.")] = None


class Workers(ApiModel):
    """How many pods train together, each on its share of a step's sequences."""

    rules = (cel("self.min <= self.max", "workers.min must not be above workers.max."),)

    min: Annotated[
        int, Field(ge=1, le=64, description="Fewest to train with where there is no room for max.")
    ] = 1
    max: Annotated[int, Field(ge=1, le=64, description="How many to train with.")] = 1


class TensorParallelism(ApiModel):
    """How many of the workers share one copy of the model."""

    tensor: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Workers that hold one copy together, each a part of every matrix; there "
            "are workers/tensor copies.",
        ),
    ] = 1


class JobResources(ApiModel):
    """What the trainer pod asks for."""

    rules = (
        cel(
            "!has(self.accelerator.count) || self.accelerator.resource != 'none'",
            "resources.accelerator.count needs resources.accelerator.resource, such as "
            "nvidia.com/gpu.",
        ),
    )

    accelerator: Annotated[Accelerator, Field(description="The devices of the trainer pod.")] = (
        Accelerator()
    )


class SpareCapacity(ApiModel):
    """Devices that serving leaves idle, until it needs them."""

    enabled: Annotated[
        bool, Field(description="Run on devices that may be asked back at any time.")
    ] = False
    yield_within_seconds: Annotated[
        int,
        Field(ge=5, le=600, description="Leave at a checkpoint within this time; killed after."),
    ] = 30


class Failure(ApiModel):
    """What happens when the trainer crashes."""

    backoff_limit: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Crashes in a row without a new checkpoint until the job fails.",
        ),
    ] = 6
    hang_timeout_seconds: Annotated[
        int,
        Field(
            ge=1,
            description="A trainer that ends no micro-batch for so long is started again.",
        ),
    ] = 1800
