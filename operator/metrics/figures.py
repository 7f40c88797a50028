"""Which series the autoscaler reads, and what it makes of them. Pure, and one for both sources.

Names are vLLM's and the gateway's. A source brings each figure as a number per deployment; the
three states (value, zero, unknown) come about here, so that both sources give the same answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from mizzen.operator.planning.canary import Answers
from mizzen.operator.planning.scale_rules import Slo
from mizzen.operator.planning.signals import UNKNOWN, Engines, Signal, Traffic
from mizzen.operator.planning.trial import Sides

Name = tuple[str, str]  # namespace and name of a deployment


class Kind(Enum):
    """How the series of one deployment become one number."""

    SUM = "sum"
    MEAN = "mean"
    RATE = "rate"  # per second, of a counter, over the short window
    SLOW_RATE = "slow rate"  # over five minutes


class Origin(Enum):
    """Whose series it is, which decides its labels."""

    GATEWAY = "gateway"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure; `by` is a label whose values are kept apart."""

    metric: str
    kind: Kind
    origin: Origin = Origin.RUNTIME
    by: tuple[str, ...] = ()


ARRIVALS = Figure("mizzen_gateway_arrivals_total", Kind.RATE, Origin.GATEWAY)
IN_FLIGHT = Figure("mizzen_gateway_in_flight_requests", Kind.SUM, Origin.GATEWAY)
HELD = Figure("mizzen_gateway_held_requests", Kind.SUM, Origin.GATEWAY)
# There for every deployment the gateway knows, also one without a replica or a request.
KNOWN = Figure("mizzen_gateway_endpoints_ready", Kind.SUM, Origin.GATEWAY)

# By revision, there only while a deployment has a canary, and counted from its beginning.
CANARY_REQUESTS = Figure(
    "mizzen_gateway_canary_requests_total", Kind.SUM, Origin.GATEWAY, by=("revision",)
)
CANARY_FAILURES = Figure(
    "mizzen_gateway_canary_failures_total", Kind.SUM, Origin.GATEWAY, by=("revision",)
)
FIRST_BYTES = Figure(
    "mizzen_gateway_canary_first_byte_seconds_bucket",
    Kind.SUM,
    Origin.GATEWAY,
    by=("revision", "le"),
)

# The same of adapters on trial, and of all else that was asked beside each.
_TRIAL = ("adapter", "digest", "side")
TRIAL_REQUESTS = Figure("mizzen_gateway_trial_requests_total", Kind.SUM, Origin.GATEWAY, by=_TRIAL)
TRIAL_FAILURES = Figure("mizzen_gateway_trial_failures_total", Kind.SUM, Origin.GATEWAY, by=_TRIAL)
TRIAL_FIRST_BYTES = Figure(
    "mizzen_gateway_trial_first_byte_seconds_bucket",
    Kind.SUM,
    Origin.GATEWAY,
    by=(*_TRIAL, "le"),
)

RUNNING = Figure("vllm:num_requests_running", Kind.SUM)
WAITING = Figure("vllm:num_requests_waiting", Kind.SUM)
KV_USED = Figure("vllm:kv_cache_usage_perc", Kind.MEAN)
CACHE = Figure("vllm:cache_config_info", Kind.MEAN, by=("block_size", "num_gpu_blocks"))
STEPS = Figure("mizzen:engine_step_seconds_count", Kind.RATE)
STEP_SECONDS = Figure("mizzen:engine_step_seconds_sum", Kind.RATE)
COMPUTED = Figure("vllm:iteration_tokens_total_sum", Kind.RATE)
DECODED = Figure("vllm:generation_tokens_total", Kind.RATE)
PROMPTED = Figure("vllm:prompt_tokens_total", Kind.RATE)
FINISHED = Figure("vllm:request_prompt_tokens_count", Kind.SLOW_RATE)
PROMPT_LENGTHS = Figure("vllm:request_prompt_tokens_sum", Kind.SLOW_RATE)
OUTPUT_LENGTHS = Figure("vllm:request_generation_tokens_sum", Kind.SLOW_RATE)
TTFT = Figure("vllm:time_to_first_token_seconds_bucket", Kind.SLOW_RATE, by=("le",))
ITL = Figure("vllm:inter_token_latency_seconds_bucket", Kind.SLOW_RATE, by=("le",))

ALL = (
    *(ARRIVALS, IN_FLIGHT, HELD, KNOWN),
    *(CANARY_REQUESTS, CANARY_FAILURES, FIRST_BYTES),
    *(TRIAL_REQUESTS, TRIAL_FAILURES, TRIAL_FIRST_BYTES),
    *(RUNNING, WAITING, KV_USED, CACHE),
    *(STEPS, STEP_SECONDS, COMPUTED, DECODED, PROMPTED),
    *(FINISHED, PROMPT_LENGTHS, OUTPUT_LENGTHS, TTFT, ITL),
)


@dataclass(slots=True)
class Raw:
    """What a source found for one deployment."""

    # By figure and by the values of its `by` labels. Missing is unknown.
    values: dict[tuple[Figure, tuple[str, ...]], float] = field(default_factory=dict)
    gateway_age_s: float | None = None  # of the oldest gateway; None: there is none
    runtime_age_s: float | None = None
    reporting: int | None = 0  # replicas whose series are among them; None: not known

    def number(self, figure: Figure) -> float | None:
        """Return the figure, None where it is missing or no finite number."""
        value = self.values.get((figure, ()))
        return None if value is None or not math.isfinite(value) else value

    def parts(self, figure: Figure) -> dict[tuple[str, ...], float]:
        """Return the figure by the values of its labels."""
        return {
            labels: value
            for (one, labels), value in self.values.items()
            if one == figure and math.isfinite(value)
        }

    def buckets(self, figure: Figure) -> dict[tuple[str, ...], float]:
        """Return a histogram's `parts`; a foreign series of its name may have no edge."""
        return {labels: within for labels, within in self.parts(figure).items() if _is_edge(labels)}


def _is_edge(labels: tuple[str, ...]) -> bool:
    try:
        return not math.isnan(float(labels[-1]))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A deployment whose figures are wanted."""

    name: Name
    # Replicas that have served for a while: as many must report, else the sums are too small.
    settled: int
    addresses: tuple[str, ...] = ()  # of all replicas in service
    slo: Slo = field(default_factory=Slo)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found for one deployment."""

    traffic: Traffic = field(default_factory=Traffic)
    engines: Engines = field(default_factory=Engines)
    answers: Mapping[str, Answers] | None = None  # by revision; None: not known
    trials: Mapping[tuple[str, str], Sides] | None = None  # by adapter and digest
    answers_age_s: float = 0.0


def measured(raw: Raw, target: Target) -> Measured:
    """Return the signals of one deployment."""
    is_whole = raw.reporting is not None and raw.reporting >= target.settled
    runtime = _Signals(raw, raw.runtime_age_s if is_whole else None)
    is_known = raw.gateway_age_s is not None and raw.number(KNOWN) is not None
    return Measured(
        traffic=_traffic(raw, target, runtime),
        engines=_engines(raw, runtime, is_unscraped=is_whole and raw.reporting == 0),
        answers=_by_revision(raw) if is_known else None,
        trials=_trials(raw) if is_known else None,
        answers_age_s=raw.gateway_age_s or 0.0,
    )


@dataclass(frozen=True, slots=True)
class _Signals:
    raw: Raw
    age_s: float | None

    def of(self, value: float | None) -> Signal:
        return UNKNOWN if value is None or self.age_s is None else Signal(value, self.age_s)

    def number(self, figure: Figure) -> Signal:
        return self.of(self.raw.number(figure))


def _traffic(raw: Raw, target: Target, runtime: _Signals) -> Traffic:
    gateway = _Signals(raw, raw.gateway_age_s)
    # A gateway that knows the deployment and has counted nothing says zero; one that does not
    # know it says nothing.
    nothing = 0.0 if raw.number(KNOWN) is not None else None

    def counted(figure: Figure) -> Signal:
        value = raw.number(figure)
        return gateway.of(nothing if value is None else value)

    return Traffic(
        arrivals_per_s=counted(ARRIVALS),
        in_flight=counted(IN_FLIGHT),
        held=counted(HELD),
        ttft_ok_ratio=runtime.of(share_within(raw.buckets(TTFT), target.slo.ttft_s)),
        itl_ok_ratio=runtime.of(share_within(raw.buckets(ITL), target.slo.itl_s)),
    )


def _engines(raw: Raw, runtime: _Signals, *, is_unscraped: bool) -> Engines:
    finished = raw.number(FINISHED)
    computed, decoded = raw.number(COMPUTED), raw.number(DECODED)
    prefilled = None if computed is None or decoded is None else max(0.0, computed - decoded)

    def mean_length(total: Figure) -> Signal:
        tokens = raw.number(total)
        return runtime.of(tokens / finished if tokens is not None and finished else None)

    return Engines(
        running=runtime.number(RUNNING),
        waiting=runtime.number(WAITING),
        kv_used_ratio=runtime.number(KV_USED),
        kv_tokens=runtime.of(_kv_tokens(raw)),
        prompt_tokens=mean_length(PROMPT_LENGTHS),
        output_tokens=mean_length(OUTPUT_LENGTHS),
        steps_per_s=runtime.number(STEPS),
        step_seconds_per_s=runtime.number(STEP_SECONDS),
        decoded_per_s=runtime.of(decoded),
        prefilled_per_s=runtime.of(prefilled),
        prompted_per_s=runtime.number(PROMPTED),
        is_unscraped=is_unscraped,
    )


def _by_revision(raw: Raw) -> dict[str, Answers]:
    """Return what was counted of each revision that was sent any request."""
    counted = _answers(raw, CANARY_REQUESTS, CANARY_FAILURES, FIRST_BYTES)
    return {revision: answers for (revision,), answers in counted.items()}


def _trials(raw: Raw) -> dict[tuple[str, str], Sides]:
    """Return what was counted of each adapter on trial."""
    counted = _answers(raw, TRIAL_REQUESTS, TRIAL_FAILURES, TRIAL_FIRST_BYTES)
    return {
        (adapter, digest): Sides(
            own=counted.get((adapter, digest, "own"), Answers()),
            others=counted.get((adapter, digest, "others"), Answers()),
        )
        for adapter, digest, _ in counted
    }


def _answers(
    raw: Raw, requests: Figure, failures: Figure, first_bytes: Figure
) -> dict[tuple[str, ...], Answers]:
    failed, buckets = raw.parts(failures), raw.buckets(first_bytes)
    return {
        kind: Answers(
            requests=count,
            failures=failed.get(kind, 0.0),
            first_bytes={
                float(edge): within
                for (*name, edge), within in buckets.items()
                if tuple(name) == kind
            },
        )
        for kind, count in raw.parts(requests).items()
    }


def _kv_tokens(raw: Raw) -> float | None:
    """Return the room of the smallest replica; blocks and their size are labels, not values."""
    rooms = [
        float(size) * float(blocks)
        for size, blocks in raw.parts(CACHE)
        if size.isdigit() and blocks.isdigit() and int(blocks)
    ]
    return min(rooms, default=None)


def share_within(buckets: Mapping[tuple[str, ...], float], limit_s: float | None) -> float | None:
    """Return the share of a cumulative histogram within the limit, None without observations.

    Between two edges it is interpolated, as Prometheus' histogram_quantile does.
    """
    if limit_s is None:
        return None
    edges = sorted((float(labels[0]), count) for labels, count in buckets.items())
    if not edges or edges[-1][1] <= 0:
        return None
    total = edges[-1][1]
    for (low, below), (high, within) in pairwise([(0.0, 0.0), *edges]):
        if limit_s < high:
            share = 0.0 if high == float("inf") else (limit_s - low) / (high - low)
            return (below + share * (within - below)) / total
    return 1.0
