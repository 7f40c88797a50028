"""The status of an LLMDeployment, from what was decided and observed. Pure: no clock, no client.

Ready says that the spec as written is served; Available says that somebody answers, be it the
revision before. While nothing changes the document is equal to the byte, so nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from mizzen.operator.planning.course import Rollout
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.status.causes import Cause, first_cause
from mizzen.operator.status.conditions import (
    Condition,
    ConditionType,
    Document,
    Flip,
    condition_status,
    flips,
    next_conditions,
)
from mizzen.operator.status.fit import PLAN
from mizzen.operator.status.loading import Loading, slowest
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.rollout import ROLLOUT, read_rollout, rollback_cause, rollout_document
from mizzen.operator.status.scaling import ScalingSeen

_THERE = (Standing.FAILED, Standing.STARTING, Standing.UNREADY, Standing.IN_SERVICE)
_STATES = {
    Standing.LOST: "Failed",
    Standing.FAILED: "Failed",
    Standing.STARTING: "Starting",
    Standing.UNREADY: "Starting",
    Standing.IN_SERVICE: "Ready",
    Standing.DRAINING: "Draining",
    Standing.LEAVING: "Draining",
}
_EVENT_CONDITIONS = (
    ConditionType.ACCEPTED,
    ConditionType.READY,
    ConditionType.SCALING_ACTIVE,
    ConditionType.ADAPTERS_READY,
    ConditionType.DEGRADED,
)


@dataclass(frozen=True, slots=True)
class PodSeen:
    """One pod of a replica."""

    name: str
    node: str = ""
    loading: Loading | None = None  # while its model is fetched


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """One replica with what people want to know of it."""

    revision: str
    standing: Standing
    pods: tuple[PodSeen, ...]
    cause: Cause | None = None
    adapters: tuple[str, ...] = ()

    @property
    def is_there(self) -> bool:
        """Whether it counts: not deleted, not draining."""
        return self.standing in _THERE

    @property
    def serves(self) -> bool:
        """Whether it takes traffic."""
        return self.standing is Standing.IN_SERVICE


@dataclass(frozen=True, slots=True)
class AdapterSeen:
    """One wanted adapter and what the replicas said about it."""

    name: str
    digest: str | None = None
    job: str | None = None
    error: str = ""
    on_trial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Everything the status is made of."""

    generation: int
    revision: str
    desired: int
    max_unavailable: int
    scaling: ScalingSeen | None  # None: the number of replicas is fixed
    is_holding: bool = False  # the gates are closed, to see whether anybody asks
    url: str
    selector: str
    devices_per_pod: int
    replicas: tuple[ReplicaSeen, ...] = ()
    adapters: tuple[AdapterSeen, ...] = ()
    has_leftover_adapters: bool = False  # a replica may still have some that nobody wants
    rollout: Rollout | None = None
    promoted: Mapping[str, object] = field(default_factory=dict)  # status.promotedModel
    note: str = ""  # what the rollout waits for
    plan: Document | None = None  # what the model takes and what fits
    refusal: Cause | None = None  # why the spec cannot be followed at all
    failure: Cause | None = None  # why the last writes did not succeed

    @property
    def current(self) -> tuple[ReplicaSeen, ...]:
        """The replicas of the wanted revision that count."""
        return tuple(r for r in self.replicas if r.revision == self.revision and r.is_there)

    @property
    def serving(self) -> int:
        """Replicas that take traffic, of any revision."""
        return sum(replica.serves for replica in self.replicas)

    @property
    def is_complete(self) -> bool:
        """Whether all that is wanted serves."""
        has_all = sum(r.serves for r in self.current) >= self.desired or self.is_holding
        return has_all and not self.refusal

    @property
    def is_settled(self) -> bool:
        """Whether in addition nothing is left over; the deleted, which are ending, aside."""
        left = [r for r in self.replicas if r.standing is not Standing.LEAVING]
        return self.is_complete and len(left) == self.desired

    @property
    def has_old(self) -> bool:
        """Whether replicas of earlier revisions still count."""
        return any(r.revision != self.revision and r.is_there for r in self.replicas)

    @property
    def cause(self) -> Cause | None:
        """What keeps the wanted replicas from serving, where anything does."""
        if self.refusal or self.is_complete:
            return self.refusal or rollback_cause(self.rollout)
        causes = [r.cause for r in self.current if r.cause and not r.serves]
        return self.failure or first_cause(causes) or rollback_cause(self.rollout)


def next_status(previous: Mapping[str, object], seen: Seen, *, now: datetime) -> Document:
    """Return the status to write."""
    before = previous.get("conditions") or []
    assert isinstance(before, list)
    there = [replica for replica in seen.replicas if replica.is_there]
    pods = [pod for replica in seen.replicas for pod in _pods(replica)]
    status: Document = {
        "observedGeneration": seen.generation,
        "phase": _phase(seen),
        "ready": f"{seen.serving}/{seen.desired}",
        "replicas": len(there),
        "readyReplicas": seen.serving,
        "updatedReplicas": len(seen.current),
        "selector": seen.selector,
        "url": seen.url,
        "gpus": len(pods) * seen.devices_per_pod,
        "conditions": next_conditions(
            before, _conditions(seen), observed_generation=seen.generation, now=now
        ),
    }
    if seen.revision:
        status["revision"] = seen.revision
    if seen.rollout:
        status[ROLLOUT] = rollout_document(seen.rollout)
    if seen.promoted:
        status["promotedModel"] = dict(seen.promoted)
    if seen.plan:
        status[PLAN] = seen.plan
    if pods:
        status["pods"] = pods
    if seen.adapters or seen.has_leftover_adapters:
        # Empty, it is the only thing to tell that replicas are to be asked once more.
        status["adapters"] = [_adapter(adapter, seen) for adapter in seen.adapters]
    return status


def news(previous: Mapping[str, object], status: Document) -> list[Flip]:
    """Return the flips worth an Event; one cause that flips several conditions is told once.

    Being not ready during a planned change is no warning; a fault is. That a first start went as
    it should is for the status to say: a thousand deployments would bring a thousand Events.
    """
    before, after = previous.get("conditions") or [], status["conditions"]
    assert isinstance(before, list) and isinstance(after, list)
    has_fault = condition_status(after, ConditionType.DEGRADED) != "False"
    is_first_start = previous.get("phase") == "Starting" and not previous.get("readyReplicas")
    told: dict[tuple[str, str], Flip] = {}
    if (rollback := _rollback(previous, status)) is not None:
        told[rollback.reason, rollback.message] = rollback
    for flip in flips(before, after, of=_EVENT_CONDITIONS):
        is_over = flip.type is ConditionType.DEGRADED and flip.status == "False"
        has_started = flip.type is ConditionType.READY and flip.status == "True" and is_first_start
        if not (is_over or has_started):  # Ready says the same as the former in better words
            told.setdefault(
                (flip.reason, flip.message),
                replace(flip, is_warning=flip.is_warning and has_fault),
            )
    return list(told.values())


def _rollback(previous: Mapping[str, object], status: Document) -> Flip | None:
    """Return the news of a revision that was given up: the trouble may be told already."""
    cause = rollback_cause(read_rollout(status))
    if cause is None or rollback_cause(read_rollout(previous)) is not None:
        return None
    return Flip(ConditionType.DEGRADED, "True", cause.reason.value, cause.message, is_warning=True)


def _phase(seen: Seen) -> str:
    cause = seen.cause
    if cause and cause.reason is Reason.ROLLED_BACK:
        return "RolledBack"
    if (seen.desired == 0 or seen.is_holding) and not cause:
        return "Stopping" if any(r.is_there for r in seen.replicas) else "Stopped"
    if seen.is_complete:
        return "Ready"
    if cause and seen.serving:
        return "Degraded"
    if cause and cause.reason is Reason.UNSCHEDULABLE:
        return "Pending"
    if cause and cause.needs_change:
        return "Failed"
    if not seen.has_old:
        return "Starting"
    return "Paused" if seen.rollout and seen.rollout.is_paused else "Updating"


def _pods(replica: ReplicaSeen) -> list[Document]:
    """Return its pods. A node is told once it serves: earlier it would cost a write of its own."""
    state = _STATES[replica.standing]
    if replica.cause and replica.cause.reason is Reason.UNSCHEDULABLE:
        state = "Pending"
    shows_node = state in ("Ready", "Draining")
    documents: list[Document] = []
    for pod in replica.pods:
        document: Document = {"name": pod.name, "state": state}
        if shows_node and pod.node:
            document["node"] = pod.node
        if replica.adapters:
            document["adapters"] = list(replica.adapters)
        if pod.loading:
            document["loading"] = pod.loading.to_api()
        documents.append(document)
    return documents


def _adapter(adapter: AdapterSeen, seen: Seen) -> Document:
    document: Document = {
        "name": adapter.name,
        "readyReplicas": sum(r.serves and adapter.name in r.adapters for r in seen.replicas),
    }
    optional: Document = {
        "digest": adapter.digest,
        "job": adapter.job,
        "onTrial": adapter.on_trial,
        "error": adapter.error[:1024],
    }
    return document | {key: value for key, value in optional.items() if value}


def _conditions(seen: Seen) -> list[Condition]:
    progress = _progress(seen)
    is_stalled = bool(seen.cause and seen.cause.needs_change)
    conditions = [
        _ready(seen, progress),
        _accepted(seen),
        _available(seen, progress),
        _progressing(seen, progress, is_stalled=is_stalled),
        _scaling_active(seen),
        _adapters_ready(seen),
        _degraded(seen),
    ]
    if seen.cause and is_stalled:
        stalled = ConditionType.STALLED
        conditions.append(Condition(stalled, True, seen.cause.reason, seen.cause.message))
    elif not seen.is_settled:
        conditions.append(Condition(ConditionType.RECONCILING, True, *progress))
    return conditions


def _progress(seen: Seen) -> tuple[Reason, str]:
    """Return what is under way, as a reason and a sentence."""
    serving = sum(replica.serves for replica in seen.current)
    how_many = f"{serving} of {_replicas(seen.desired)}"
    if seen.is_settled:
        return Reason.SETTLED, "Everything is as the spec wants it."
    if seen.is_complete:
        return Reason.DRAINING, "Replicas that are not wanted any more finish their requests."
    if seen.has_old:
        is_paused = seen.rollout is not None and seen.rollout.is_paused
        reason = Reason.PAUSED if is_paused else Reason.ROLLING_OUT
        return reason, seen.note or f"{how_many} in service with the new revision."
    return Reason.STARTING, f"{how_many} in service; the rest is starting."


def _ready(seen: Seen, progress: tuple[Reason, str]) -> Condition:
    type_ = ConditionType.READY
    if seen.cause:
        return Condition(type_, False, seen.cause.reason, seen.cause.message)
    if not seen.is_complete:
        return Condition(type_, False, *progress)
    if seen.desired == 0 or seen.is_holding:
        return Condition(type_, True, Reason.SCALED_TO_ZERO, _rest(seen))
    message = f"{seen.desired} of {_replicas(seen.desired)} in service."
    return Condition(type_, True, Reason.IN_SERVICE, message)


def _rest(seen: Seen) -> str:
    if seen.is_holding:
        return "Nobody asks; new requests are held while that is looked at once more."
    return "No replica is wanted."


def _accepted(seen: Seen) -> Condition:
    type_ = ConditionType.ACCEPTED
    if seen.refusal:
        return Condition(type_, False, seen.refusal.reason, seen.refusal.message)
    return Condition(type_, True, Reason.VALID, "The spec is valid.")


def _available(seen: Seen, progress: tuple[Reason, str]) -> Condition:
    type_ = ConditionType.AVAILABLE
    if (seen.desired == 0 or seen.is_holding) and not seen.serving:
        return Condition(type_, False, Reason.SCALED_TO_ZERO, _rest(seen))
    if seen.serving >= max(1, seen.desired - seen.max_unavailable):
        return Condition(type_, True, Reason.IN_SERVICE, "Requests are answered.")
    if seen.cause:
        return Condition(type_, False, seen.cause.reason, seen.cause.message)
    return Condition(type_, False, *progress)


def _progressing(seen: Seen, progress: tuple[Reason, str], *, is_stalled: bool) -> Condition:
    type_ = ConditionType.PROGRESSING
    if seen.cause and is_stalled:
        is_back = seen.cause.reason is Reason.ROLLED_BACK
        message = seen.cause.message if is_back else "Nothing moves until this is mended."
        return Condition(type_, False, seen.cause.reason, message)
    reason, message = progress
    if loading := slowest(pod.loading for r in seen.current for pod in r.pods if pod.loading):
        message = f"{message} {loading.sentence}"
    return Condition(type_, not seen.is_settled, reason, message)


def _scaling_active(seen: Seen) -> Condition:
    type_ = ConditionType.SCALING_ACTIVE
    if seen.scaling is None:
        message = "The number of replicas is fixed by spec.replicas."
        return Condition(type_, False, Reason.SCALING_DISABLED, message)
    return Condition(type_, seen.scaling.is_active, seen.scaling.reason, seen.scaling.message)


def _adapters_ready(seen: Seen) -> Condition:
    type_ = ConditionType.ADAPTERS_READY
    if not seen.adapters:
        return Condition(type_, True, Reason.NO_ADAPTERS, "No adapter is wanted.")
    for adapter in seen.adapters:
        if adapter.error:
            message = f"Adapter {adapter.name} cannot be loaded: {adapter.error}"
            return Condition(type_, False, Reason.ADAPTER_REFUSED, message[:4096])
    wanted = {adapter.name for adapter in seen.adapters}
    serving = [replica for replica in seen.replicas if replica.serves]
    if serving and all(wanted <= set(replica.adapters) for replica in serving):
        message = "Every replica in service has every adapter."
        return Condition(type_, True, Reason.ADAPTERS_LOADED, message)
    message = "The adapters are loaded on each replica as soon as it can."
    return Condition(type_, False, Reason.LOADING_ADAPTERS, message)


def _degraded(seen: Seen) -> Condition:
    type_ = ConditionType.DEGRADED
    adapters = _adapters_ready(seen)
    if seen.cause:
        return Condition(type_, True, seen.cause.reason, seen.cause.message)
    if adapters.reason is Reason.ADAPTER_REFUSED:
        return Condition(type_, True, adapters.reason, adapters.message)
    return Condition(type_, False, Reason.AS_EXPECTED, "Nothing is wrong.")


def _replicas(count: int) -> str:
    return "1 replica is" if count == 1 else f"{count} replicas are"
