"""LLMDeployment: one served model, as its user writes and reads it."""

from typing import Annotated, ClassVar

from pydantic import Field

from mizzen.operator.crds.common import (
    Accelerator,
    AdapterName,
    ApiModel,
    ModelSource,
    PodTemplatePatch,
    cel,
)
from mizzen.operator.crds.front import Guardrail, PromptTemplate
from mizzen.operator.crds.llmdeployment_status import (
    LLMDeploymentStatus,
)
from mizzen.operator.crds.rollout import Rollout
from mizzen.operator.crds.scaling import Scaling
from mizzen.operator.crds.served_model import Model

KIND = "LLMDeployment"
PLURAL = "llmdeployments"
# Changes of these fields leave the pods as they are; all others make a new revision.
NOT_IN_REVISION = ("replicas", "scaling", "adapters", "rollout", "prompts", "guardrails")


class Parallelism(ApiModel):
    """How one copy of the model is spread over devices and pods."""

    rules = (
        cel(
            "self.tensor * self.pipeline % self.nodes == 0",
            "parallelism.tensor times parallelism.pipeline must be a multiple of "
            "parallelism.nodes, so that every pod of a replica holds equally many ranks.",
        ),
    )

    tensor: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Ranks that share every layer of one copy of the model: GPUs, or "
            "processes on the CPU.",
        ),
    ] = 1
    pipeline: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="Stages that the model's layers are cut into, each held by as many ranks "
            "as tensor says. A request goes through them one after the other.",
        ),
    ] = 1
    nodes: Annotated[
        int,
        Field(
            ge=1,
            le=16,
            description="Pods that make up one replica, each with tensor times pipeline / nodes "
            "of the ranks. They are created, placed and restarted together.",
        ),
    ] = 1

    @property
    def ranks_per_pod(self) -> int:
        """Ranks that one pod of a replica runs."""
        return self.tensor * self.pipeline // self.nodes


class Adapter(ApiModel):
    """A LoRA adapter served beside the base model."""

    name: Annotated[
        AdapterName, Field(description="Clients ask for it as MODEL:NAME in the `model` field.")
    ]
    source: Annotated[
        ModelSource,
        Field(description="Folder in PEFT layout: pvc://CLAIM/PATH or file:///PATH."),
    ]


class Engine(ApiModel):
    """Settings of the runtime's engine."""

    image: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=512,
            description="Container image of the runtime; the operator's own default when left out.",
        ),
    ] = None
    max_num_seqs: Annotated[
        int | None, Field(ge=1, le=4096, description="Most requests computed at the same time.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None, Field(ge=16, le=1048576, description="Most tokens computed in one step.")
    ] = None
    kv_cache_gib: Annotated[
        float | None,
        Field(
            alias="kvCacheGiB",
            gt=0,
            le=4096,
            description="Memory for the keys and values of running requests, in GiB, all ranks "
            "together. Measured at start when left out.",
        ),
    ] = None
    lends_weights: Annotated[
        bool | None,
        Field(
            description="Let fine-tune jobs of mode Loan train on idle replicas. Their pods may "
            "then write to the claim of the model."
        ),
    ] = None


class Drain(ApiModel):
    """How a replica leaves."""

    max_seconds: Annotated[
        int,
        Field(
            ge=0,
            le=86400,
            description="How long a leaving replica may take to finish its requests.",
        ),
    ] = 120


class LLMDeploymentSpec(ApiModel):
    """What the user wants to be served."""

    rules = (
        cel(
            "!(has(self.replicas) && has(self.scaling)) || self.scaling.dryRun",
            "Set replicas for a fixed size or scaling for bounds, not both; scaling.dryRun true "
            "beside replicas only reports.",
        ),
        cel(
            "!has(self.scaling) || !has(self.scaling.budget) || "
            "self.accelerator.resource != 'none'",
            "scaling.budget.gpus needs accelerator.resource, such as nvidia.com/gpu.",
        ),
        cel(
            "!has(self.scaling) || !has(self.scaling.budget) || self.scaling.budget.gpus >= "
            "(self.scaling.min > 1 ? self.scaling.min : 1) * (has(self.accelerator.count) ? "
            "self.accelerator.count * self.parallelism.nodes : "
            "self.parallelism.tensor * self.parallelism.pipeline)",
            "scaling.budget.gpus is less than what scaling.min replicas (at least one) hold: "
            "raise it, or lower scaling.min or the devices of a replica.",
        ),
        cel(
            "!has(self.accelerator.count) || self.accelerator.resource != 'none'",
            "accelerator.count needs accelerator.resource, such as nvidia.com/gpu.",
        ),
        cel(
            "!has(self.accelerator.count) || "
            "self.accelerator.count * self.parallelism.nodes >= "
            "self.parallelism.tensor * self.parallelism.pipeline",
            "parallelism.tensor times parallelism.pipeline is larger than the devices of a "
            "replica: raise accelerator.count or parallelism.nodes, or lower one of the two.",
        ),
    )

    model: Annotated[Model, Field(description="The model to serve.")]
    replicas: Annotated[
        int | None,
        Field(
            ge=0,
            le=1000,
            description="Fixed number of replicas; 1 when neither this nor scaling is set. "
            "`kubectl scale` changes it.",
        ),
    ] = None
    scaling: Annotated[
        Scaling | None,
        Field(description="Bounds and goals instead of a fixed number of replicas."),
    ] = None
    accelerator: Annotated[Accelerator, Field(description="The devices each pod asks for.")] = (
        Accelerator()
    )
    parallelism: Annotated[
        Parallelism, Field(description="How one copy of the model is spread.")
    ] = Parallelism()
    adapters: Annotated[
        list[Adapter],
        Field(
            default_factory=list,
            max_length=64,
            description="LoRA adapters to serve beside the base model. Adapters promoted by "
            "FineTuneJobs come on top.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ]
    engine: Annotated[Engine, Field(description="Settings of the runtime's engine.")] = Engine()
    drain: Annotated[Drain, Field(description="How a replica leaves.")] = Drain()
    rollout: Annotated[Rollout, Field(description="How replicas are replaced on a change.")] = (
        Rollout()
    )
    prompts: Annotated[
        list[PromptTemplate] | None,
        Field(
            max_length=64,
            description="Templates for chats, applied by the gateway.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["id"],
            },
        ),
    ] = None
    guardrails: Annotated[
        list[Guardrail] | None,
        Field(
            max_length=16,
            description="Checks by the gateway, in this order.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    pod_template_patch: Annotated[
        PodTemplatePatch | None, Field(description="Additions to the pods Mizzen makes.")
    ] = None

    @property
    def desired_replicas(self) -> int:
        """How many replicas should run, before the autoscaler said anything."""
        if self.replicas is not None:
            return self.replicas
        return max(1, self.scaling.min) if self.scaling else 1

    def wanted_replicas(self, scaled: int | None) -> int:
        """Return how many replicas should run; `scaled` is what the autoscaler wants, if it did."""
        if self.replicas is not None or self.scaling is None or scaled is None:
            return self.desired_replicas
        return scaled

    @property
    def devices_per_replica(self) -> int:
        """Devices one replica requests; 0 on the CPU."""
        return self.devices_per_pod * self.parallelism.nodes

    @property
    def devices_per_pod(self) -> int:
        """Devices one pod requests; 0 on the CPU."""
        if not self.accelerator.is_gpu:
            return 0
        return self.accelerator.count or self.parallelism.ranks_per_pod


class LLMDeployment(ApiModel):
    """One model, served by replicas behind one address.

    The shortest one is spec.model.source alone.
    """

    rules: ClassVar[tuple[dict[str, str], ...]] = (
        cel(
            "self.metadata.name.size() <= 40 && "
            "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
            "The name must have at most 40 lower-case letters, digits and dashes and begin with a "
            "letter: services and pods are named after it.",
        ),
    )

    spec: Annotated[LLMDeploymentSpec, Field(description="What should be served, and how.")]
    status: Annotated[
        LLMDeploymentStatus | None,
        Field(description="What the operator observed. Written by the operator alone."),
    ] = None
