"""The autoscaler's part of a deployment's status: what it says, and what is read back. Pure.

It is written on each change of the answer and otherwise at most once a minute, with figures
rounded, so that a quiet deployment costs no write. A restarted operator goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from mizzen.operator.planning.digits import three_digits
from mizzen.operator.planning.scale import Decision
from mizzen.operator.planning.scale_history import History, Move
from mizzen.operator.planning.scale_situation import LOAD_REASONS
from mizzen.operator.planning.throughput import CostFit, Shape, StepCosts
from mizzen.operator.status.conditions import Document, parse_rfc3339, rfc3339
from mizzen.operator.status.reasons import Reason, reason_or

SCALING = "scaling"
_KEPT_MOVES = 10
_REFRESH_S = 60.0
_FALSE = (
    Reason.SIGNALS_UNKNOWN,
    Reason.OTHER_AUTOSCALER,
    Reason.TIME_ZONE_UNKNOWN,
    Reason.SCALING_DRY_RUN,
)
# What may change without anybody having to hear of it at once; a message has fitted figures in it,
# and another state comes with another message.
_SLOW = ("message", "formula", "inputs", "updatedAt", "learned", "wake")


@dataclass(frozen=True, slots=True)
class ScalingSeen:
    """What the condition ScalingActive says."""

    is_active: bool | None
    reason: Reason
    message: str


def scaling_seen(status: Mapping[str, object]) -> ScalingSeen:
    """Return the condition of a deployment that scales, from its status so far."""
    scaling = status.get(SCALING)
    if not isinstance(scaling, dict):
        message = "The autoscaler has not looked at the deployment yet."
        return ScalingSeen(None, Reason.SCALING_NOT_YET, message)
    reason = reason_or(str(scaling["state"]), Reason.SCALING_ON_LOAD)
    return ScalingSeen(reason not in _FALSE, reason, str(scaling["message"]))


def state_of(decision: Decision, *, is_dry_run: bool, rival: str = "") -> tuple[Reason, str]:
    """Return the condition's reason and message: what a person should hear of first."""
    if rival:
        return Reason.OTHER_AUTOSCALER, (
            f"{rival} scales this deployment too, so nothing is changed. Delete it, or remove "
            "spec.scaling and let it drive spec.replicas."
        )
    if is_dry_run:
        return Reason.SCALING_DRY_RUN, (
            "spec.scaling.dryRun is true: status.scaling.recommended says what would be run."
        )
    if decision.is_awaiting_scrape:
        return Reason.AWAITING_SCRAPE, (
            "The replicas in service are new and none has been scraped yet. Until one has, "
            "arrivals may raise their number and nothing lowers it."
        )
    if decision.is_blind:
        return Reason.SIGNALS_UNKNOWN, (
            "The load is not known: metrics of the gateway or of a replica are missing or too "
            "old. No replica is taken away until they are back."
        )
    if decision.slo_problem:
        return Reason.SLO_UNREACHABLE, decision.slo_problem
    if decision.stuck:
        return Reason.REPLICAS_STUCK, (
            f"Not started in twice the usual time: {', '.join(decision.stuck)}. Scaling goes on "
            "without; see status.pods and the pods' events."
        )
    if decision.limited:
        return Reason.SCALING_LIMITED, decision.limited
    if decision.is_capacity_unknown:
        return Reason.CAPACITY_UNKNOWN, (
            "What a replica can serve is still being measured; until then a cautious number of "
            "requests per replica is used."
        )
    return Reason.SCALING_ON_LOAD, "The number of replicas follows the load."


def scaling_document(
    previous: Mapping[str, object] | None,
    decision: Decision,
    *,
    desired: int,
    state: tuple[Reason, str],
    is_dry_run: bool = False,
) -> Document:
    """Return the field to write; `desired` is what is run, whatever the decision says."""
    history = decision.state
    now = _time(decision.at_s)
    inputs = {name: _figure(value) for name, value in decision.inputs.items()}
    document: Document = {
        "desired": desired,
        "state": state[0].value,
        "message": state[1][:1024],
        "reason": decision.reason.value,
        "formula": decision.formula[:512],
        "inputs": inputs,
        "updatedAt": now,
    }
    if is_dry_run:
        document["recommended"] = decision.replicas
    if decision.is_holding and not is_dry_run:
        document["holding"] = True
    if history.wake_token:
        document["wake"] = history.wake_token[:128]
    if history.flapping_until_s is not None:
        document["flappingUntil"] = _time(history.flapping_until_s)
    if learned := _learned(history):
        document["learned"] = learned
    moves = _moves(previous, document, history)
    if moves:
        document["history"] = moves
    return document


def time_zone_document(
    previous: Mapping[str, object] | None, problem: str, *, desired: int, now: datetime
) -> Document:
    """Return the field for a schedule whose time zone does not exist: nothing moves, or is held."""
    reason = Reason.TIME_ZONE_UNKNOWN
    return {
        **_without(previous or {"inputs": {}, "updatedAt": rfc3339(now)}, "holding"),
        "desired": desired,
        "state": reason.value,
        "message": problem,
        "reason": reason.value,
        "formula": f"{desired} so far: the schedules cannot be read",
    }


def is_worth_writing(
    previous: Mapping[str, object] | None, document: Document, *, now_s: float
) -> bool:
    """Whether the answer changed, or its figures did and the last write is a minute old."""
    if previous is None or _without(previous, *_SLOW) != _without(document, *_SLOW):
        return True
    if _without(previous, "updatedAt") == _without(document, "updatedAt"):
        return False
    return now_s - parse_rfc3339(str(previous["updatedAt"])).timestamp() >= _REFRESH_S


def history_of(scaling: Mapping[str, object] | None, *, running: int) -> History:
    """Return the history that a status tells of; windows begin anew, so nothing goes too early.

    `running` replicas are there before the autoscaler ever looked.
    """
    if scaling is None:
        return History(desired=running or None)
    learned = scaling.get("learned")
    history = _with_learned(History(), learned if isinstance(learned, dict) else {})
    flapping = scaling.get("flappingUntil")
    wanted = scaling.get("recommended", scaling.get("desired"))
    return replace(
        history,
        desired=int(str(wanted)),
        moves=tuple(_read_moves(scaling.get("history"))),
        wake_token=str(scaling.get("wake") or ""),
        flapping_until_s=parse_rfc3339(str(flapping)).timestamp() if flapping else None,
    )


def _moves(
    previous: Mapping[str, object] | None, document: Document, history: History
) -> list[Document]:
    """Return the moves for people, newest first; earlier ones keep what was written then."""
    known = previous.get("history") if previous else None
    written = list(known) if isinstance(known, list) else []
    told = {(move["time"], move["after"]) for move in written}
    for move in history.moves:
        at = _time(move.at_s)
        if (at, move.after) in told:
            continue
        entry: Document = {
            "time": at,
            "before": move.before,
            "after": move.after,
            "reason": document["reason"],
            "formula": document["formula"],
            "inputs": document["inputs"],
        }
        if at == document["updatedAt"]:
            written.insert(0, entry)
    return written[:_KEPT_MOVES]


def _read_moves(documents: object) -> list[Move]:
    if not isinstance(documents, list):
        return []
    return [
        Move(
            at_s=parse_rfc3339(move["time"]).timestamp(),
            before=int(move["before"]),
            after=int(move["after"]),
            is_steered=move["reason"] in LOAD_REASONS,
        )
        for move in reversed(documents)
    ]


def _learned(history: History) -> Document:
    costs, shape = history.fit.costs, history.shape
    found: dict[str, float | None] = {
        "stepSeconds": costs.per_step_s if costs else None,
        "sequenceSeconds": costs.per_sequence_s if costs else None,
        "promptTokenSeconds": costs.per_prompt_token_s if costs else None,
        "promptTokens": shape.prompt if shape else None,
        "computedTokens": shape.computed if shape else None,
        "outputTokens": shape.output if shape else None,
        "kvTokens": history.kv_tokens,
        "loadRatio": history.load_ratio,
    }
    document: Document = {
        name: float(three_digits(value)) for name, value in found.items() if value is not None
    }
    if history.starts:
        document["startSeconds"] = [float(three_digits(seconds)) for seconds in history.starts]
    return document


def _with_learned(history: History, learned: Mapping[str, object]) -> History:
    def number(name: str) -> float | None:
        value = learned.get(name)
        return float(str(value)) if value is not None else None

    step, sequence, prompt = map(number, ("stepSeconds", "sequenceSeconds", "promptTokenSeconds"))
    lengths = [number(name) for name in ("promptTokens", "computedTokens", "outputTokens")]
    starts = learned.get("startSeconds")
    costs = None
    if step is not None and sequence is not None and prompt is not None:
        costs = StepCosts(step, sequence, prompt)
    shape = None
    if lengths[0] is not None and lengths[1] is not None and lengths[2] is not None:
        shape = Shape(lengths[0], lengths[1], lengths[2])
    return replace(
        history,
        fit=CostFit(costs=costs),
        shape=shape,
        kv_tokens=number("kvTokens"),
        load_ratio=number("loadRatio"),
        starts=tuple(map(float, starts if isinstance(starts, list) else ())),
    )


def _figure(value: float | None) -> str:
    return "unknown" if value is None else three_digits(value)


def _time(moment_s: float) -> str:
    return rfc3339(datetime.fromtimestamp(moment_s, UTC))


def _without(document: Mapping[str, object], *names: str) -> Document:
    return {name: value for name, value in document.items() if name not in names}
