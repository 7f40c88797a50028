"""Carries out what was decided about the generations of a job's pods."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from mizzen.operator.controllers.job_lending import preemptions_of, reclaimed_at
from mizzen.operator.controllers.job_loan import lend
from mizzen.operator.controllers.job_observe import Observed
from mizzen.operator.crds.common import Json
from mizzen.operator.desired.jobs import (
    Worker,
    build_config_map,
    build_trainer_pod,
    generation_name,
)
from mizzen.operator.desired.labels import HOSTNAME
from mizzen.operator.desired.train_config import Job
from mizzen.operator.desired.workers import build_workers_policy, build_workers_service
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref, uid_of
from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Fence,
    Outcome,
    Queue,
    Shrink,
    Start,
    Step,
)
from mizzen.operator.status.trainer_pods import (
    generation_of,
    newest_pods,
    outcome_of,
    pods_of,
    rank_of,
    size_of,
)

_YIELD_DEADLINE_S = 60


async def apply(
    step: Step | None, observed: Observed, kube: Kube, facts: Facts, *, now: datetime
) -> Step | None:
    """Carry a step out; return it, or what was done instead since its devices are gone.

    Raises:
        LoanRefusedError: no replica will ever lend its weights to the job.
    """
    job = observed.job
    if job is None:
        return step
    match step:
        case Start() if job.spec.mode == "Loan":
            return await lend(step, job, facts, now=now)
        case AskToYield() if job.spec.mode == "Loan":
            if observed.pod is not None and (address := observed.pod["status"].get("podIP")):
                await facts.trainers.take_back(address)
        case Start(number):
            step = await _start(step, observed, kube, facts)
            if isinstance(step, Queue):
                return step
            oldest = number if isinstance(step, Shrink) else number - 1
            await _forget_generations(observed, kube, before=oldest)
        case Dismiss():
            for pod in newest_pods(observed.pods):
                if outcome_of(pod) in (Outcome.PENDING, Outcome.RUNNING):
                    await _dismiss(pod, kube)
        case AskToYield():
            await _yield(observed, kube, facts)
        case Fence():
            for pod in newest_pods(observed.pods):
                await kube.delete(pod, grace_s=0, check_version=False)
            facts.ledger.nudged.set()
    return step


async def _start(step: Start, observed: Observed, kube: Kube, facts: Facts) -> Start | Queue:
    """Make a generation's pods; return how many, or why they have to wait after all."""
    job, number = observed.job, step.number
    assert job is not None
    made = pods_of(observed.pods, number)
    await facts.namespaces.prepare(job.namespace, kube)
    async with facts.ledger.handing_out:
        if (wait := facts.ledger.wait_of(observed.key)) is not None:
            return Queue(wait)  # a look that has just ended gave the devices to somebody else
        given = facts.ledger.take(observed.key)
        # What an operator that died in between has made already says how many there shall be.
        workers = size_of(made[0]) if made else len(given) or step.workers
        await _prepare(job, number, workers, kube, is_begun=bool(made))
        missing = sorted(set(range(workers)) - {rank_of(pod) for pod in made})
        if isinstance(step, Shrink):
            given = await _places(observed.pods, kube)
        hostnames = dict(zip(missing, given, strict=False))
        for rank in missing:
            worker = Worker(
                generation=number,
                workers=workers,
                rank=rank,
                crashes=step.crashes,
                preemptions=preemptions_of(observed.resource),
                hostname=hostnames.get(rank, ""),
            )
            await _create(job, worker, kube, facts)
    return replace(step, workers=workers)


async def _prepare(job: Job, number: int, workers: int, kube: Kube, *, is_begun: bool) -> None:
    """Make what a generation's pods read, and how they find each other."""
    if workers > 1:
        await kube.apply(build_workers_policy(job))
        await kube.apply(build_workers_service(job))
    config_map = build_config_map(job, number, workers=workers)
    live = await kube.create(config_map)
    if live["data"] != config_map["data"] and not is_begun:
        # Of an operator that died before it made a pod, and had been given other devices.
        await kube.delete(live, check_version=False)
        await kube.create(config_map)


async def _create(job: Job, worker: Worker, kube: Kube, facts: Facts) -> None:
    image, pull_policy = facts.config.runtime_image, facts.config.image_pull_policy
    await kube.create(build_trainer_pod(job, worker, image=image, pull_policy=pull_policy))


async def _places(pods: list[Json], kube: Kube) -> tuple[str, ...]:
    """Return the hostnames that the newest pods were bound to, of those that have a node."""
    placed = [pod for pod in newest_pods(pods) if pod["spec"].get("nodeName")]
    # Asked of the API server: the store keeps no selectors.
    live = [await kube.get(Ref.of(pod)) for pod in placed]
    selectors = [(pod or {}).get("spec", {}).get("nodeSelector") or {} for pod in live]
    return tuple(selector[HOSTNAME] for selector in selectors if HOSTNAME in selector)


async def _yield(observed: Observed, kube: Kube, facts: Facts) -> None:
    """Ask the leader, which tells the others."""
    pod = observed.pod
    if pod is None or "deletionTimestamp" in pod["metadata"]:
        return
    address = pod.get("status", {}).get("podIP")
    deadline_s = _YIELD_DEADLINE_S
    if reclaimed_at(pod) is not None and observed.job is not None:
        deadline_s = observed.job.spec.spare_capacity.yield_within_seconds
    if address and await facts.trainers.ask_to_yield(address, deadline_s=deadline_s):
        return
    if observed.status.get("phase") == "Yielding":
        # It heard and is on its way out, its last words to be read from its pod; were it stuck,
        # its liveness probe would end it.
        return
    # Deaf: SIGTERM means the same to a trainer. Without an address it has not begun, and nor have
    # the others: they need not wait to be told one after the other.
    for each in [pod] if address else newest_pods(observed.pods):
        await _dismiss(each, kube)


async def _dismiss(pod: Json, kube: Kube) -> None:
    live = await kube.get(Ref.of(pod))
    if live is not None and uid_of(live) == uid_of(pod):
        await kube.delete(live, check_version=False)


async def _forget_generations(observed: Observed, kube: Kube, *, before: int) -> None:
    """Delete what generations before this one left; the last one stays for its log."""
    assert observed.job is not None
    for pod in observed.pods:
        if (number := generation_of(pod)) < before:
            name = generation_name(observed.job.name, number)
            await _dismiss(pod, kube)
            ref = Ref("v1", "ConfigMap", observed.job.namespace, name)
            if (config_map := await kube.get(ref)) is not None:
                await kube.delete(config_map, check_version=False)
