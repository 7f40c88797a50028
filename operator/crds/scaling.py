"""How an LLMDeployment's size follows its load: what a user writes, and what the status shows."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, cel

Day = Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
DAYS: tuple[Day, ...] = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_CLOCK = r"^([01][0-9]|2[0-3]):[0-5][0-9]$"
_CLOCK_END = r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"
Replicas = Annotated[int, Field(ge=0, le=1000)]


class ScalingSlo(ApiModel):
    """What clients are promised; the number of replicas follows from it."""

    ttft_ms: Annotated[
        int | None,
        Field(ge=1, le=3600000, description="Longest time to a request's first token."),
    ] = None
    itl_ms: Annotated[
        int | None,
        Field(
            ge=1,
            le=60000,
            description="Longest time between two tokens. 100, or four steps of an empty replica "
            "where that is more, when left out.",
        ),
    ] = None
    attainment: Annotated[
        float,
        Field(ge=0.1, le=0.999, description="Share of tokens and requests that must keep it."),
    ] = 0.95


class ScalingTargets(ApiModel):
    """Plain figures per replica to hold, instead of or beside an SLO; the largest answer wins."""

    rules = (
        cel(
            "has(self.concurrency) || has(self.queue) || has(self.kvUsedRatio)",
            "Set at least one of targets.concurrency, targets.queue and targets.kvUsedRatio.",
        ),
    )

    concurrency: Annotated[
        float | None, Field(gt=0, le=100000, description="Requests running or waiting.")
    ] = None
    queue: Annotated[
        float | None,
        Field(
            gt=0,
            le=100000,
            description="Requests waiting. An empty queue does not say how many replicas are "
            "spare, so it gives back one at a time.",
        ),
    ] = None
    kv_used_ratio: Annotated[
        float | None, Field(gt=0, le=1, description="Share of the KV cache in use.")
    ] = None


class ScalingSchedule(ApiModel):
    """Other bounds at some hours of some days."""

    rules = (
        cel(
            "self.start < self.end",
            "A schedule's end must be after its start on the same day; "
            "write a second schedule for the hours after midnight.",
        ),
        cel("self.min <= self.max", "A schedule's min must not be larger than its max."),
    )

    name: Annotated[str, Field(min_length=1, max_length=63, description="Shown in the status.")]
    timezone: Annotated[
        str,
        Field(
            min_length=1,
            max_length=64,
            pattern=r"^[A-Za-z][A-Za-z0-9_+/-]*$",
            description="IANA time zone, such as Europe/Berlin. All schedules of a deployment "
            "have the same one.",
        ),
    ] = "UTC"
    days: Annotated[
        list[Day],
        Field(
            default_factory=lambda: list(DAYS),
            min_length=1,
            max_length=7,
            description="Days of the week; all when left out.",
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ]
    start: Annotated[str, Field(max_length=5, pattern=_CLOCK, description="First minute: HH:MM.")]
    end: Annotated[
        str,
        Field(
            max_length=5,
            pattern=_CLOCK_END,
            description="First minute after it: HH:MM, 24:00 for midnight.",
        ),
    ]
    min: Annotated[
        int,
        Field(ge=0, le=1000, description="Fewest replicas meanwhile. 0 needs idle."),
    ]
    max: Annotated[int, Field(ge=1, le=1000, description="Most replicas meanwhile.")]


class ScalingFallback(ApiModel):
    """What to run while nobody knows the load."""

    replicas: Annotated[
        int, Field(ge=1, le=1000, description="At least this many; those there are stay.")
    ]
    after_seconds: Annotated[
        int, Field(ge=15, le=86400, description="How long the load must have been unknown.")
    ] = 300


class ScalingBudget(ApiModel):
    """What the deployment may cost."""

    gpus: Annotated[
        int,
        Field(ge=1, le=10000, description="Devices that its replicas may hold together."),
    ]


class ScalingIdle(ApiModel):
    """When nobody asks."""

    to_zero_after_seconds: Annotated[
        int,
        Field(
            ge=30,
            le=604800,
            description="Run no replica after this long without a request; the next request "
            "waits for a start. Needs scaling.min 0.",
        ),
    ]


class Scaling(ApiModel):
    """Bounds and goals for a deployment whose size is not fixed."""

    rules = (
        cel("self.min <= self.max", "scaling.min must not be larger than scaling.max."),
        cel(
            "has(self.idle) || (self.min > 0 && "
            "(!has(self.schedules) || self.schedules.all(s, s.min > 0)))",
            "scaling.min 0 needs scaling.idle.toZeroAfterSeconds, which says when to run none. "
            "So does a schedule's min 0.",
        ),
        cel(
            "!has(self.idle) || self.min == 0 || "
            "(has(self.schedules) && self.schedules.exists(s, s.min == 0))",
            "scaling.idle needs scaling.min 0 (or a schedule with min 0): otherwise a replica "
            "always runs.",
        ),
        cel(
            "!has(self.fallback) || self.fallback.replicas <= self.max",
            "scaling.fallback.replicas must not be larger than scaling.max.",
        ),
        cel(
            "!has(self.schedules) || self.schedules.all(a, "
            "a.timezone == self.schedules[0].timezone)",
            "All scaling.schedules must have the same timezone, so that it is plain which holds.",
        ),
        cel(
            "!has(self.schedules) || self.schedules.all(a, self.schedules.filter(b, "
            "a.start < b.end && b.start < a.end && a.days.exists(d, d in b.days)).size() == 1)",
            "Two scaling.schedules overlap: at every minute of the week at most one may hold. "
            "Change days, start or end.",
        ),
    )

    min: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Fewest replicas. 0 allows none while nobody asks, and needs idle.",
        ),
    ] = 1
    max: Annotated[int, Field(ge=1, le=1000, description="Most replicas.")]
    reserve: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="Further replicas whose devices are kept free of FineTuneJobs.",
        ),
    ] = 0
    slo: Annotated[
        ScalingSlo | None,
        Field(
            description="What clients are promised. Without slo and targets the default ITL is "
            "kept."
        ),
    ] = None
    targets: Annotated[
        ScalingTargets | None, Field(description="Plain figures per replica to hold.")
    ] = None
    idle: Annotated[ScalingIdle | None, Field(description="When nobody asks.")] = None
    schedules: Annotated[
        list[ScalingSchedule] | None,
        Field(
            max_length=16,
            description="Other bounds at some hours; they must not overlap.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ] = None
    fallback: Annotated[
        ScalingFallback | None, Field(description="What to run while nobody knows the load.")
    ] = None
    budget: Annotated[ScalingBudget | None, Field(description="What the deployment may cost.")] = (
        None
    )
    dry_run: Annotated[
        bool,
        Field(
            description="Only report, in status.scaling.recommended: the number of replicas stays "
            "as it is, or spec.replicas where that is set beside it."
        ),
    ] = False


class ScalingMove(ApiModel):
    """One change of the wanted number."""

    time: Annotated[str, Field(description="When.", json_schema_extra={"format": "date-time"})]
    before: Annotated[int, Field(description="Replicas wanted until then.")]
    after: Annotated[int, Field(description="Replicas wanted from then on.")]
    reason: Annotated[str, Field(max_length=64, description="Why, in one word.")]
    formula: Annotated[str, Field(max_length=512, description="Why, with the numbers.")]
    inputs: Annotated[
        dict[str, str],
        Field(max_length=32, description="The figures it was made of, or unknown."),
    ]


class ScalingLearned(ApiModel):
    """What was measured of this model on these devices."""

    step_seconds: Annotated[
        float | None, Field(description="An engine step of an empty replica.")
    ] = None
    sequence_seconds: Annotated[
        float | None, Field(description="What each running sequence adds to a step.")
    ] = None
    prompt_token_seconds: Annotated[
        float | None, Field(description="What each prompt token adds to a step.")
    ] = None
    prompt_tokens: Annotated[float | None, Field(description="Mean length of a prompt.")] = None
    computed_tokens: Annotated[
        float | None, Field(description="Of it, what the prefix cache does not have.")
    ] = None
    output_tokens: Annotated[float | None, Field(description="Mean length of an answer.")] = None
    kv_tokens: Annotated[
        float | None, Field(description="Tokens that one replica's KV cache holds.")
    ] = None
    load_ratio: Annotated[
        float | None, Field(description="How full replicas are planned to be.")
    ] = None
    start_seconds: Annotated[
        list[float] | None,
        Field(max_length=32, description="The last start-up times, oldest first."),
    ] = None


class ScalingStatus(ApiModel):
    """The autoscaler's answer, and what it was made of."""

    desired: Annotated[int, Field(description="Replicas the operator runs.")]
    recommended: Annotated[int | None, Field(description="With dryRun: replicas it would run.")] = (
        None
    )
    state: Annotated[
        str, Field(max_length=64, description="The reason of the condition ScalingActive.")
    ]
    message: Annotated[str, Field(max_length=1024, description="Its message.")]
    reason: Annotated[
        str, Field(max_length=64, description="Why the number is what it is, in one word.")
    ]
    formula: Annotated[str, Field(max_length=512, description="Why, with the numbers.")]
    inputs: Annotated[
        dict[str, str],
        Field(max_length=32, description="The figures it was made of, or unknown."),
    ]
    holding: Annotated[
        bool | None,
        Field(description="Whether requests are held, the last look before zero."),
    ] = None
    updated_at: Annotated[
        str,
        Field(
            description="When inputs and formula were last written: on each change of the answer, "
            "else at most once a minute.",
            json_schema_extra={"format": "date-time"},
        ),
    ]
    wake: Annotated[
        str | None,
        Field(max_length=128, description="The gateways' last wake that was answered."),
    ] = None
    flapping_until: Annotated[
        str | None,
        Field(
            description="Until then the first step down after a rise waits twice as long: the "
            "load turned too often.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None
    learned: Annotated[
        ScalingLearned | None, Field(description="What was measured of this model.")
    ] = None
    history: Annotated[
        list[ScalingMove] | None,
        Field(max_length=10, description="The last changes of the wanted number, newest first."),
    ] = None
