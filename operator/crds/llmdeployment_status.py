"""What an LLMDeployment says about itself."""

from typing import Annotated

from pydantic import Field

from mizzen.operator.crds.common import (
    ApiModel,
    Conditions,
)
from mizzen.operator.crds.rollout import RolloutStatus
from mizzen.operator.crds.scaling import ScalingStatus


class LoadingStatus(ApiModel):
    """How far a model's files have come."""

    stage: Annotated[
        str,
        Field(max_length=64, description="Listing, Waiting, Downloading or Checking."),
    ]
    bytes: Annotated[int | None, Field(description="Bytes that are done.")] = None
    total_bytes: Annotated[int | None, Field(description="Bytes in all.")] = None
    bytes_per_second: Annotated[int | None, Field(description="Rate of the last while.")] = None
    remaining_seconds: Annotated[int | None, Field(description="Time left at that rate.")] = None
    observed_at: Annotated[
        str, Field(description="When that was so.", json_schema_extra={"format": "date-time"})
    ]


class PodStatus(ApiModel):
    """One pod as the operator sees it."""

    name: Annotated[str, Field(max_length=253, description="Name of the pod.")]
    state: Annotated[
        str,
        Field(
            max_length=64,
            description="Pending, Starting, Ready, Draining or Failed.",
        ),
    ]
    node: Annotated[str | None, Field(max_length=253, description="Node it runs on.")] = None
    adapters: Annotated[
        list[str] | None, Field(max_length=128, description="Adapters it has loaded.")
    ] = None
    loading: Annotated[
        LoadingStatus | None,
        Field(description="While its model is fetched: how far that is, told every few seconds."),
    ] = None


class AdapterStatus(ApiModel):
    """One adapter as the replicas see it."""

    name: Annotated[str, Field(max_length=63, description="Name of the adapter.")]
    ready_replicas: Annotated[int, Field(description="Replicas that have it loaded.")] = 0
    digest: Annotated[
        str | None, Field(max_length=128, description="Digest of its content, where known.")
    ] = None
    job: Annotated[
        str | None, Field(max_length=253, description="The FineTuneJob that promoted it.")
    ] = None
    on_trial: Annotated[
        bool | None, Field(description="Whether its requests are counted apart and watched.")
    ] = None
    error: Annotated[
        str | None, Field(max_length=1024, description="Why it could not be loaded.")
    ] = None


class PromotedModel(ApiModel):
    """The result of a FineTuneJob that is served instead of spec.model.source."""

    job: Annotated[str, Field(max_length=253, description="The FineTuneJob.")]
    digest: Annotated[str | None, Field(max_length=128, description="Digest of the model.")] = None
    revision: Annotated[str, Field(max_length=63, description="The revision that brings it.")]


class FitStatus(ApiModel):
    """How the model lies on its devices, as its newest replica says."""

    revision: Annotated[str, Field(max_length=63, description="Revision of that replica.")]
    source: Annotated[str, Field(max_length=2048, description="The model.source it had.")]
    placement: Annotated[
        str, Field(max_length=63, description="Hash of what decides where pods are placed.")
    ]
    model: Annotated[
        dict[str, int], Field(max_length=16, description="Its layers, widths, heads and so on.")
    ]
    dtype: Annotated[str, Field(max_length=32, description="Number format of the weights.")]
    tensor: Annotated[int, Field(description="Ranks that share each layer.")]
    pipeline: Annotated[
        int | None, Field(description="Stages of a replica, where there are several.")
    ] = None
    device_bytes: Annotated[
        int | None, Field(description="Memory of a device; not there on the CPU.")
    ] = None
    weight_bytes: Annotated[int, Field(description="Memory of the weights, over all ranks.")]
    kv_bytes_per_token: Annotated[
        int, Field(description="Memory of a token's keys and values, over all ranks.")
    ]
    kv_tokens: Annotated[int, Field(description="Tokens that a replica's KV cache holds.")]
    max_model_len: Annotated[int, Field(description="Longest prompt plus answer.")]
    max_concurrency: Annotated[
        int, Field(description="Requests of 2048 tokens, or maxModelLen, that fit at once.")
    ]


class LLMDeploymentStatus(ApiModel):
    """What the operator observed."""

    observed_generation: Annotated[
        int | None, Field(description="The metadata.generation this status belongs to.")
    ] = None
    phase: Annotated[
        str | None,
        Field(max_length=64, description="One word for people; programs read the conditions."),
    ] = None
    ready: Annotated[
        str | None, Field(max_length=32, description="Ready of wanted replicas, such as 2/3.")
    ] = None
    replicas: Annotated[int | None, Field(description="Replicas that exist.")] = None
    ready_replicas: Annotated[int | None, Field(description="Replicas that take traffic.")] = None
    updated_replicas: Annotated[
        int | None, Field(description="Replicas of the current revision.")
    ] = None
    selector: Annotated[
        str | None,
        Field(max_length=512, description="Label selector of the pods, for scaling tools."),
    ] = None
    revision: Annotated[
        str | None,
        Field(max_length=63, description="Hash of everything that makes pods differ."),
    ] = None
    url: Annotated[
        str | None, Field(max_length=512, description="OpenAI-compatible address in the cluster.")
    ] = None
    gpus: Annotated[int | None, Field(description="Devices held by the existing pods.")] = None
    plan: Annotated[
        FitStatus | None,
        Field(description="What the model takes and what fits, once a replica has served."),
    ] = None
    pods: Annotated[
        list[PodStatus] | None,
        Field(
            max_length=2048,
            description="The pods, by name.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    adapters: Annotated[
        list[AdapterStatus] | None,
        Field(
            max_length=128,
            description="The adapters, those of promoted jobs included.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    promoted_model: Annotated[
        PromotedModel | None, Field(description="A job's model that replaces spec.model.source.")
    ] = None
    rollout: Annotated[
        RolloutStatus | None,
        Field(description="The change under way or rolled back; not there at rest."),
    ] = None
    scaling: Annotated[
        ScalingStatus | None,
        Field(description="The autoscaler's answer, and what it was made of."),
    ] = None
    conditions: Annotated[
        Conditions | None,
        Field(
            description="Ready, Accepted, Available, Progressing, ScalingActive, AdaptersReady "
            "and Degraded, and Reconciling or Stalled while they are true."
        ),
    ] = None
