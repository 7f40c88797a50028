"""What a FineTuneJob trains: its base model and its data."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import (
    ApiModel,
    DnsLabel,
    ModelSource,
    address_rules,
    cel,
)


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


ClaimFolder = Annotated[
    str,
    Field(
        min_length=1,
        max_length=512,
        json_schema_extra=address_rules(
            r"pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+",
            "A folder must look like pvc://CLAIM/PATH",
        ),
    ),
]


class FeedbackRef(ApiModel):
    """A deployment's feedback log."""

    deployment: Annotated[DnsLabel, Field(description="The LLMDeployment.")]
    folder: Annotated[
        ClaimFolder, Field(description="Folder of the logs, pvc://CLAIM/PATH, by deployment.")
    ]


class Dataset(ApiModel):
    """One source of examples."""

    rules = (
        cel("has(self.uri) != has(self.feedbackRef)", "Set exactly one of uri and feedbackRef."),
        cel(
            "!(has(self.feedbackRef) && has(self.sha256))",
            "sha256 is for a file: leave it out beside feedbackRef.",
        ),
    )

    name: Annotated[DnsLabel, Field(description="Name of the source in status and logs.")]
    uri: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=1024,
            description="A JSONL file, as configMap://NAME/KEY, pvc://CLAIM/PATH or http(s)://.",
            json_schema_extra=address_rules(
                r"configMap://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+"
                r"|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+|https?://.+",
                "A dataset's uri must look like configMap://NAME/KEY, pvc://CLAIM/PATH or "
                "https://HOST/PATH",
            ),
        ),
    ] = None
    feedback_ref: Annotated[
        FeedbackRef | None,
        Field(description="What people said of a deployment's answers, until the job was made."),
    ] = None
    format: Annotated[
        Literal["auto", "messages", "promptCompletion"],
        Field(description="Shape of a line for sft and distill; auto looks at the first one."),
    ] = "auto"
    weight: Annotated[
        float,
        Field(gt=0, le=1000, description="How often its examples are drawn, beside the others'."),
    ] = 1.0
    sha256: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="Digest the file must have.",
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
    engine: Annotated[
        Literal["Auto", "InProcess", "Ray"],
        Field(
            description="What prepares the data: the trainer by itself, or Ray Data in its pod, "
            "block by block. Auto: Ray from 256 MiB on."
        ),
    ] = "Auto"
