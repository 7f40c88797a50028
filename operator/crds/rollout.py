"""How a deployment's replicas come to a new revision: spec.rollout."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from mizzen.operator.crds.common import ApiModel, cel


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
    return pattern


class CanaryStep(ApiModel):
    """A share of the requests, for a while."""

    weight: Annotated[int, Field(ge=1, le=99, description="Percent of the requests.")]
    hold_seconds: Annotated[
        int, Field(ge=0, le=604800, description="How long, before the next step.")
    ] = 60


class Probe(ApiModel):
    """A prompt whose answer tells whether what is served talks sense."""

    prompt: Annotated[str, Field(min_length=1, max_length=4096, description="Text to continue.")]
    expect: Annotated[
        str,
        AfterValidator(_compiles),
        Field(
            min_length=1,
            max_length=1024,
            description="Regular expression that must be found in the greedy answer.",
        ),
    ]
    max_tokens: Annotated[int, Field(ge=1, le=256, description="Length of the answer.")] = 32


class Limits(ApiModel):
    """By how much worse something new may fare; nothing that is left out is looked at."""

    error_ratio: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="More of its requests failing than of those beside it, by this share.",
        ),
    ] = None
    ttft_factor: Annotated[
        float | None,
        Field(ge=1.25, le=100, description="A TTFT p90 of more than so many times theirs."),
    ] = None
    min_requests: Annotated[
        int, Field(ge=1, le=1000000, description="With fewer requests neither is judged.")
    ] = 10


class RollbackOn(Limits):
    """What ends a canary; it is compared with the revision before."""

    probe: Annotated[
        Probe | None, Field(description="Asked of a canary replica before every step.")
    ] = None


class CanaryRollout(ApiModel):
    """A new revision gets a growing share of the requests first."""

    steps: Annotated[
        list[CanaryStep], Field(min_length=1, max_length=20, description="One after the other.")
    ]
    rollback_on: Annotated[RollbackOn, Field(description="What ends it early.")] = RollbackOn()


class Rollout(ApiModel):
    """How replicas are replaced when the pods' definition changes."""

    rules = (
        cel(
            "!has(self.canary) || self.maxSurge >= 1",
            "rollout.canary needs rollout.maxSurge of at least 1: its first replica comes on top.",
        ),
        cel(
            "!has(self.canary) || self.strategy != 'InPlaceWeights'",
            "rollout.canary needs replicas of its own: set rollout.strategy to Rolling.",
        ),
        cel(
            "self.maxSurge + self.maxUnavailable >= 1",
            "rollout.maxSurge and rollout.maxUnavailable must not both be 0: nothing could move.",
        ),
    )

    strategy: Annotated[
        Literal["Rolling", "InPlaceWeights"],
        Field(
            description="InPlaceWeights: where nothing but model.source changes, to another folder "
            "on the same claim, replicas take the new weights one after the other while they "
            "serve. Where that cannot be they are replaced."
        ),
    ] = "Rolling"
    max_surge: Annotated[
        int, Field(ge=0, le=1000, description="Replicas above the wanted number meanwhile.")
    ] = 1
    max_unavailable: Annotated[
        int, Field(ge=0, le=1000, description="Replicas that may be missing meanwhile.")
    ] = 0
    canary: Annotated[
        CanaryRollout | None,
        Field(description="Steps before the new revision replaces the one before."),
    ] = None
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


class CanaryStatus(ApiModel):
    """How far a canary is."""

    step: Annotated[int, Field(description="Steps that it has passed.")]
    weight: Annotated[int, Field(description="Percent of the requests that it gets.")]
    since: Annotated[
        str | None,
        Field(
            description="When the step took effect; not there while its replicas start.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None
    passed: Annotated[
        str | None, Field(max_length=512, description="How the last step's requests fared.")
    ] = None


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
    paused: Annotated[
        bool | None,
        Field(description="Whether it waits to be resumed, or for a replica to be wanted."),
    ] = None
    in_place_refused: Annotated[
        str | None,
        Field(max_length=512, description="Why weights cannot be swapped in place."),
    ] = None
    canary: Annotated[CanaryStatus | None, Field(description="While there is one.")] = None
    failure: Annotated[
        RolloutFailure | None,
        Field(description="Why it was rolled back. It is not tried again until the spec changes."),
    ] = None
