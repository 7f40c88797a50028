"""How a deployment's replicas come to a new revision: spec.rollout."""

from typing import Annotated

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, cel


class Rollout(ApiModel):
    """How replicas are replaced when the pods' definition changes."""

    rules = (
        cel(
            "self.maxSurge + self.maxUnavailable >= 1",
            "rollout.maxSurge and rollout.maxUnavailable must not both be 0: nothing could move.",
        ),
    )

    max_surge: Annotated[
        int, Field(ge=0, le=1000, description="Replicas above the wanted number meanwhile.")
    ] = 1
    max_unavailable: Annotated[
        int, Field(ge=0, le=1000, description="Replicas that may be missing meanwhile.")
    ] = 0
    paused: Annotated[
        bool,
        Field(
            description="Bring no further replica to a new revision. The size still follows the "
            "spec, and failed replicas are replaced."
        ),
    ] = False
    progress_deadline_seconds: Annotated[
        int,
        Field(
            ge=10,
            le=604800,
            description="A new revision that brings no further replica into service for so long "
            "is rolled back, and not tried again until the spec changes. The default is as long "
            "as one replica may take to start.",
        ),
    ] = 3600
    revision_history_limit: Annotated[
        int,
        Field(
            ge=0,
            le=100,
            description="Past revisions to keep, as ControllerRevisions, beside those in use. "
            "`kubectl mizzen rollout undo` goes back to one of them.",
        ),
    ] = 10


class RolloutFailure(ApiModel):
    """Why a revision was given up."""

    reason: Annotated[str, Field(max_length=64, description="In one word, as of conditions.")]
    message: Annotated[str, Field(max_length=1024, description="With the figures it was due to.")]
    at: Annotated[str, Field(description="When.", json_schema_extra={"format": "date-time"})]


class RolloutStatus(ApiModel):
    """A new revision on its way in, or one that was given up."""

    revision: Annotated[str, Field(max_length=63, description="The new revision.")]
    stable: Annotated[
        str | None,
        Field(max_length=63, description="The revision it replaces, and would go back to."),
    ] = None
    moved_at: Annotated[
        str,
        Field(
            description="When it began or last came further.",
            json_schema_extra={"format": "date-time"},
        ),
    ]
    serving: Annotated[
        int, Field(description="The most of its replicas that have served at the same time.")
    ] = 0
    paused: Annotated[bool | None, Field(description="Whether it waits to be resumed.")] = None
    failure: Annotated[
        RolloutFailure | None,
        Field(description="Why it was rolled back. It is not tried again until the spec changes."),
    ] = None
