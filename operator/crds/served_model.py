"""The model of an LLMDeployment: where it comes from, and where it is kept if it is fetched."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, LocalRef, ServedSource, cel

_IS_FETCHED = "self.source.startsWith('hf://') || self.source.startsWith('s3://')"


class ModelCache(ApiModel):
    """Where a fetched model is kept."""

    claim: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
            description="Claim of a volume that keeps models over restarts and shares them between "
            "replicas; that of a local volume makes it a cache of its node. Without it every pod "
            "has scratch space of its own.",
        ),
    ] = None
    max_gib: Annotated[
        float | None,
        Field(
            alias="maxGiB",
            gt=0,
            le=1048576,
            description="Most it may hold, in GiB: models that no replica uses make room, those "
            "unused for longest first. What the volume has when left out.",
        ),
    ] = None


class Model(ApiModel):
    """The model to serve."""

    rules = (
        cel(
            f"!has(self.credentials) || {_IS_FETCHED}",
            "model.credentials is only for models that are fetched, from hf:// or s3://.",
        ),
        cel(
            f"!has(self.cache) || {_IS_FETCHED}",
            "model.cache is only for models that are fetched, from hf:// or s3://.",
        ),
    )

    source: Annotated[
        ServedSource,
        Field(
            description="Where the weights are: pvc://CLAIM/PATH on a volume claim of this "
            "namespace, file:///PATH inside the runtime image, hf://ORG/NAME[@REVISION] on a hub "
            "or s3://BUCKET/PREFIX. A folder with config.json and safetensors files, or one .gguf "
            "file."
        ),
    ]
    credentials: Annotated[
        LocalRef | None,
        Field(
            description="Secret that opens the source: its key HF_TOKEN for hf://, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) for s3://."
        ),
    ] = None
    cache: Annotated[ModelCache | None, Field(description="Where a fetched model is kept.")] = None
    served_name: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]*[A-Za-z0-9])?$",
            description="Name that clients put into the `model` field of a request. The "
            "resource's name when left out.",
        ),
    ] = None
    max_model_len: Annotated[
        int | None,
        Field(
            ge=16,
            description="Longest prompt plus answer in tokens. The model's own limit when left "
            "out; smaller leaves more room for parallel requests.",
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="Number format of the weights in memory; auto follows the device."),
    ] = "auto"
