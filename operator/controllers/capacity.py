"""The arbiter: one loop that says who gets the cluster's devices, replicas or jobs.

It looks at every node and pod, also those of others, but only while jobs hold or want devices. A
replica's pods are bound to their nodes and let in; a job that has to leave gets a note on its
pods; a job that waits reads its answer in the ledger. The jobs' own reconciles do the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from mizzen.operator.controllers.capacity_kept import read_kept
from mizzen.operator.controllers.capacity_observe import (
    Node,
    Replica,
    gang_nodes,
    is_over,
    job_of,
    read_held,
    read_leases,
    read_nodes,
    read_replicas,
    read_returning,
)
from mizzen.operator.controllers.capacity_usage import Usage, read_usage
from mizzen.operator.crds import finetunejob, llmdeployment
from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import LLMDeploymentSpec
from mizzen.operator.desired import labels
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.errors import Forbidden, KubeError
from mizzen.operator.ledger import Request
from mizzen.operator.planning.lending import (
    Decision,
    Snapshot,
    Wait,
    lend,
    next_usage,
)
from mizzen.operator.planning.preemption import Lease
from mizzen.operator.routing import DEPLOYMENT, JOB
from mizzen.operator.specs import InvalidSpecError
from mizzen.operator.status.conditions import rfc3339
from mizzen.operator.status.finetunejob import has_ended

logger = logging.getLogger(__name__)

# A burst of requests is answered by one look.
_SETTLE_S = 0.2


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the cluster showed."""

    nodes: Mapping[str, Node]
    pods: tuple[Json, ...]
    jobs: Mapping[str, Json]  # by NAMESPACE/NAME, those that hold or want devices
    requests: Mapping[Key, Request]
    leases: Mapping[str, tuple[Lease, ...]]  # by resource
    now: datetime


class Notes(Protocol):
    """Texts that the operator's next process finds again."""

    def note(self, key: str, text: str) -> None:
        """Keep a text."""

    def noted(self, key: str) -> str:
        """Return what was kept last, by this process or the one before; empty where nothing was."""


class Arbiter:
    """The loop, and how much each namespace has used of late."""

    def __init__(
        self, *, kube: Kube, facts: Facts, notes: Notes, on_change: Callable[[Key], None]
    ) -> None:
        self._kube = kube
        self._facts = facts
        self._on_change = on_change
        self._notes = notes
        self._usage = Usage()

    async def run(self, *, every_s: float, clock: Callable[[], datetime]) -> None:
        """Look every few seconds, and soon after a job asked."""
        nudged = self._facts.ledger.nudged
        while True:
            try:
                await self.look(now=clock())
            except Exception as error:
                if isinstance(error, KubeError):
                    logger.warning("the arbiter's look failed: %s", error)
                else:
                    # A defect of ours must not end the loop that all devices need.
                    logger.exception("the arbiter's look failed")
            try:
                await asyncio.wait_for(nudged.wait(), timeout=every_s)
                await asyncio.sleep(_SETTLE_S)
            except TimeoutError:
                pass
            nudged.clear()

    async def look(self, *, now: datetime) -> None:
        """Decide for every resource that jobs hold or want.

        A write that is refused is tried again by the next look and keeps nobody else waiting.

        Raises:
            KubeError: something could not be read; the next look tries again.
        """
        async with self._facts.ledger.handing_out:
            await self._look(now)

    async def _look(self, now: datetime) -> None:
        ledger = self._facts.ledger
        jobs = self._jobs()
        gated = [
            pod
            for pod in self._facts.store.all("Pod")
            if labels.CAPACITY_GATE in labels.gates_of(pod)
        ]
        shared = frozenset(map(_resource_of, jobs.values()))
        if not shared and not gated:
            ledger.shared = shared
            return
        try:
            nodes = read_nodes((await self._kube.list("v1", "Node")).items)
            pods = tuple((await self._kube.list("v1", "Pod")).items)
        except Forbidden:
            ledger.sees_nodes, ledger.shared = False, frozenset()
            for pod in gated:
                await _try(self._kube.let_schedule(pod, labels.CAPACITY_GATE))
            return
        resources = shared | _gated_resources(pods)
        leases = {
            resource: tuple(read_leases(pods, jobs, nodes, resource, now=now))
            for resource in resources
        }
        seen = Look(nodes, pods, jobs, dict(ledger.requests), leases, now)
        self._count_usage(seen)
        ledger.sees_nodes, ledger.shared = True, shared
        admitted: dict[Key, tuple[str, ...]] = {}
        waits: dict[Key, Wait] = {}
        for resource in sorted(resources):
            decision = await self._settle(resource, seen)
            admitted |= {
                _key(job): tuple(nodes[name].hostname for name in placed)
                for job, placed in decision.admit.items()
            }
            waits |= {_key(job): wait for job, wait in decision.waits.items()}
        for key in ledger.answer(seen.requests, admitted=admitted, waits=waits):
            self._on_change(key)

    def _count_usage(self, seen: Look) -> None:
        """Count what was held since the last look, by whichever process it was made."""
        before = (
            self._usage if self._usage.looked_at else read_usage(self._notes.noted(labels.USAGE))
        )
        elapsed_s = before.elapsed_s(seen.now)
        # Also what nobody holds or wants now lies ever further back.
        used_s = {
            resource: next_usage(
                before.used_s.get(resource, {}), seen.leases.get(resource, ()), elapsed_s=elapsed_s
            )
            for resource in before.used_s.keys() | seen.leases.keys()
        }
        self._usage = Usage({name: used for name, used in used_s.items() if used}, seen.now)
        self._notes.note(labels.USAGE, self._usage.to_text())

    async def _settle(self, resource: str, seen: Look) -> Decision:
        """Decide for one resource and carry out what is not the jobs' to do."""
        replicas = read_replicas(seen.pods, seen.nodes, resource)
        decision = lend(self._snapshot(resource, seen, replicas), now=seen.now)
        for replica in replicas:
            nodes = decision.let_in.get(replica.want.name)
            if nodes is not None:
                await self._let_in(replica, nodes, seen)
            elif replica.want.is_gated:
                await self._tell_that_it_waits(replica, seen.now)
        note = {labels.RECLAIMED_AT: rfc3339(seen.now)}
        for pod in seen.pods:
            job = job_of(pod)
            if job not in decision.reclaim or is_over(pod):
                continue
            if await _try(self._kube.annotate(pod, note)):
                self._on_change(_key(str(job)))
        return decision

    async def _let_in(self, replica: Replica, nodes: tuple[str, ...], seen: Look) -> None:
        for rank, pod in enumerate(replica.pods):
            if labels.CAPACITY_GATE in labels.gates_of(pod):
                # Which nodes an affinity allows is the scheduler's to say: bound to another one,
                # the pod would wait for ever.
                is_bound = nodes and not pod["spec"].get("affinity")
                hostname = seen.nodes[nodes[rank]].hostname if is_bound else None
                await _try(self._kube.let_schedule(pod, labels.CAPACITY_GATE, hostname=hostname))

    async def _tell_that_it_waits(self, replica: Replica, now: datetime) -> None:
        """Note it on the pods, once: most wait only for the next look, which is no trouble."""
        for pod in replica.pods:
            metadata = pod["metadata"]
            if labels.WAITS_SINCE in (metadata.get("annotations") or {}):
                continue
            if await _try(self._kube.annotate(pod, {labels.WAITS_SINCE: rfc3339(now)})):
                # The echo of a write of ours is no news to anybody.
                name = metadata["labels"][labels.DEPLOYMENT]
                self._on_change(Key(DEPLOYMENT, metadata["namespace"], name))

    def _snapshot(self, resource: str, seen: Look, replicas: list[Replica]) -> Snapshot:
        queue = []
        for request in seen.requests.values():
            if request.resource == resource:
                where = gang_nodes(request.node_selector, request.tolerations, seen.nodes)
                gang = replace(request.job.gang, nodes=where)
                queue.append(replace(request.job, gang=gang))
        kept = read_kept(self._deployments(), seen.pods, seen.nodes, resource, now=seen.now)
        return Snapshot(
            resource=resource,
            capacity={node.name: node.devices.get(resource, 0) for node in seen.nodes.values()},
            held=read_held(seen.pods, seen.nodes, resource),
            returning=read_returning(seen.pods, seen.jobs, seen.nodes, resource, now=seen.now),
            leases=seen.leases[resource],
            wants=tuple(replica.want for replica in replicas),
            reserve=kept.reserve,
            surge=kept.surge,
            queue=tuple(queue),
            used_s=self._usage.used_s.get(resource, {}),
        )

    def _deployments(self) -> Iterator[tuple[Json, LLMDeploymentSpec]]:
        for document in self._facts.store.all(llmdeployment.KIND):
            try:
                yield document, self._facts.specs.deployment(document)
            except InvalidSpecError:
                continue  # its own reconcile says so

    def _jobs(self) -> dict[str, Json]:
        return {
            f"{job['metadata']['namespace']}/{job['metadata']['name']}": job
            for job in self._facts.store.all(finetunejob.KIND)
            if _resource_of(job) != "none"
            and not (job.get("spec") or {}).get("queue")
            and not has_ended(job.get("status") or {})
            and not self._is_at_rest(job)
        }

    def _is_at_rest(self, job: Json) -> bool:
        """Whether it is suspended and holds nothing any more."""
        metadata = job["metadata"]
        key = Key(JOB, metadata["namespace"], metadata["name"])
        is_suspended = bool((job.get("spec") or {}).get("suspend"))
        return is_suspended and all(map(is_over, self._facts.store.children(key, "Pod")))


async def _try(write: Awaitable[object]) -> bool:
    """Return whether the write was done; one that is refused must not hold up the others."""
    try:
        await write
    except KubeError as error:
        logger.warning("a write of the arbiter was refused: %s", error)
        return False
    return True


def _resource_of(job: Json) -> str:
    resources = (job.get("spec") or {}).get("resources") or {}
    return str((resources.get("accelerator") or {}).get("resource") or "none")


def _gated_resources(pods: Iterable[Json]) -> frozenset[str]:
    """Return the resources of pods that wait at our gate, also when no job is left."""
    return frozenset(
        resource
        for pod in pods
        if labels.CAPACITY_GATE in labels.gates_of(pod)
        for container in pod["spec"]["containers"]
        for resource in (container.get("resources") or {}).get("limits") or {}
        if "/" in resource
    )


def _key(job: str) -> Key:
    namespace, _slash, name = job.partition("/")
    return Key(JOB, namespace, name)
