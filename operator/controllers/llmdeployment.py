"""Brings an LLMDeployment one step closer to its spec: observe, plan, apply, report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_adapters import AdaptersSeen, bring_adapters
from mizzen.operator.controllers.llmdeployment_apply import apply, set_gate
from mizzen.operator.controllers.llmdeployment_canary import look_at_canary
from mizzen.operator.controllers.llmdeployment_fit import ask_fit
from mizzen.operator.controllers.llmdeployment_loading import LoadingSeen, ask_loading
from mizzen.operator.controllers.llmdeployment_observe import (
    Observed,
    SpecRefusedError,
    find_resource,
    observe,
    read_serving,
)
from mizzen.operator.controllers.llmdeployment_plan import (
    Plan,
    gates_to_open,
    groups_to_place,
    plan_deployment,
)
from mizzen.operator.controllers.llmdeployment_replicas import Group, read_groups
from mizzen.operator.controllers.llmdeployment_report import (
    report,
    report_refusal,
    what_is_seen,
)
from mizzen.operator.controllers.llmdeployment_rollout import Course
from mizzen.operator.controllers.llmdeployment_routes import bring_routes
from mizzen.operator.controllers.llmdeployment_swap import swap_weights
from mizzen.operator.desired.labels import CAPACITY_GATE, GROUP_GATE, gates_of
from mizzen.operator.engine.key import Key
from mizzen.operator.engine.results import Done, Requeue, Result, Retryable, Terminal
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import KubeError
from mizzen.operator.planning.rollout import Replica

# A runtime that did not answer is asked again soon, one that refused an adapter now and then:
# its files may be mended where they lie.
_UNANSWERED_S = 2.0
_REFUSED_S = 60.0
_MOVED_ON_S = 0.1
# What goes on beside a refused write (drains, a canary) is looked at this often at most.
_BESIDE_FAILURE_S = 10.0


async def reconcile(key: Key, *, kube: Kube, facts: Facts, now: datetime) -> Result:
    """Bring one deployment closer to its spec; safe to repeat, safe to interrupt."""
    resource = find_resource(key, facts)
    if resource is None:
        # ownerReferences take the children with it.
        await facts.namespaces.release(key.namespace, kube)
        return Done()
    try:
        serving = read_serving(resource, facts)
    except SpecRefusedError as error:
        await report_refusal(resource, error, kube, now=now)
        return Terminal(error)
    observed = await observe(key, resource, serving, kube=kube, facts=facts, now=now)
    canary = await look_at_canary(observed, facts)
    plan = plan_deployment(observed, canary, now=now)
    if plan.takes_away:
        observed = await observe(
            key, resource, serving, kube=kube, facts=facts, now=now, ask_server=True
        )
        plan = plan_deployment(observed, canary, now=now)
    failure = await _apply(key, plan, kube=kube, facts=facts, now=now)
    if any(CAPACITY_GATE in gates_of(pod) for group in plan.create for pod in group):
        facts.ledger.nudged.set()
    course, unswapped = await _swap(plan, kube=kube, facts=facts)
    failure = failure or unswapped
    # As they stand after those writes, which the store has seen.
    groups = read_groups(facts.store.children(key, "Pod"), owner_uid=observed.serving.uid, now=now)
    adapters = await _bring_adapters(groups, observed, facts)
    loading = await ask_loading(groups, observed, facts, now=now)
    fit = await ask_fit(groups, observed, facts)
    placed = await _let_place(groups_to_place(groups, plan), kube=kube)
    failure = placed or failure
    # Also after a failure: that one pod could not be made is no reason to keep another waiting.
    gates = gates_to_open(groups, observed, plan, adapters)
    failure = await _open(gates, kube=kube, now=now) or failure
    # The answers to those writes may tell of others' changes too, whose events are then no news.
    latest = read_groups(facts.store.children(key, "Pod"), owner_uid=observed.serving.uid, now=now)
    # A failure is told too: status is where people look when nothing moves.
    try:
        seen = what_is_seen(
            observed, course, latest, adapters, loading, facts=facts, plan=fit, failure=failure
        )
        await report(observed, seen, kube=kube, now=now)
    except KubeError as error:
        failure = failure or error
    is_routed = await bring_routes(key, resource, serving, kube=kube, facts=facts, now=now)
    result = _next_look(plan, adapters, loading, is_routed=is_routed)
    if failure is not None:
        return _after_failure(failure, result)
    if _replicas(latest) != _replicas(groups):
        return Requeue(_MOVED_ON_S)
    return result


def _after_failure(failure: KubeError, result: Result) -> Result:
    """Return when to look again after a write that failed, with what else there is to look at."""
    within_s = None
    if isinstance(result, Requeue):
        within_s = max(_BESIDE_FAILURE_S, result.after_s)
    if failure.retry:
        return Retryable(failure, within_s)
    return Requeue(min(_REFUSED_S, within_s or _REFUSED_S))


def _replicas(groups: Iterable[Group]) -> list[Replica]:
    return [group.replica for group in groups]


async def _apply(
    key: Key, plan: Plan, *, kube: Kube, facts: Facts, now: datetime
) -> KubeError | None:
    """Make the plan's writes; return what stopped them, if anything."""
    try:
        await facts.namespaces.prepare(key.namespace, kube)
        await apply(plan, kube, now=now)
    except KubeError as error:
        return error
    return None


async def _swap(plan: Plan, *, kube: Kube, facts: Facts) -> tuple[Course, KubeError | None]:
    """Give the replica that is due its new weights; return the course after that."""
    try:
        refusal = await swap_weights(plan, facts, kube)
    except KubeError as error:
        return plan.course, error
    if not refusal or plan.course.rollout is None:
        return plan.course, None
    rollout = replace(plan.course.rollout, in_place_refused=refusal)
    return replace(plan.course, rollout=rollout), None


async def _open(gates: Iterable[Group], *, kube: Kube, now: datetime) -> KubeError | None:
    """Let traffic in where it may come; return what stopped that, if anything."""
    try:
        for group in gates:
            await set_gate(group, is_open=True, kube=kube, now=now)
    except KubeError as error:
        return error
    return None


async def _let_place(groups: Iterable[Group], *, kube: Kube) -> KubeError | None:
    """Have the scheduler place groups that are complete; return what stopped that, if anything."""
    try:
        for group in groups:
            for pod in group.pods:
                if GROUP_GATE in gates_of(pod):
                    await kube.let_schedule(pod, GROUP_GATE)
    except KubeError as error:
        return error
    return None


async def _bring_adapters(
    groups: Iterable[Group], observed: Observed, facts: Facts
) -> AdaptersSeen:
    """Bring adapters up to date, where the deployment has or had any."""
    if not observed.serving.adapters and "adapters" not in observed.status:
        return AdaptersSeen()
    return await bring_adapters(groups, observed.serving.adapters, facts.runtimes)


def _next_look(
    plan: Plan, adapters: AdaptersSeen, loading: LoadingSeen, *, is_routed: bool
) -> Result:
    waits = [
        plan.look_again_after_s,
        loading.look_again_after_s,
        _UNANSWERED_S if adapters.incomplete or adapters.leftover else None,
        _REFUSED_S if adapters.errors or not is_routed else None,
    ]
    wait = min((wait for wait in waits if wait is not None), default=None)
    return Done() if wait is None else Requeue(max(0.1, wait))
