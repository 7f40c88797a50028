"""A job of mode Loan: which replica has it, and how it comes there and leaves again.

Where it is stands in `status.lending.replica`, and the replicas are asked before one is chosen:
what an operator began and could not write down is found there.
"""

from __future__ import annotations

import asyncio
from datetime import datetime

from mizzen.operator.controllers.llmdeployment_replicas import read_groups
from mizzen.operator.crds.common import API_VERSION, Json
from mizzen.operator.crds.llmdeployment import KIND as DEPLOYMENT_KIND
from mizzen.operator.desired.train_config import Job, build_train_config, checkpoint_folder
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.documents import Ref, uid_of
from mizzen.operator.planning.generations import Lend, Queue, Start
from mizzen.operator.planning.lending import Hold, Wait
from mizzen.operator.planning.rollout import Standing
from mizzen.operator.routing import DEPLOYMENT
from mizzen.operator.status.loans import Lender, Loan, build_trainer

_NO_REPLICA = Wait(
    Hold.NO_REPLICA,
    "The job waits for a replica of its base's deployment that is in service, serves the base it "
    "began with and lends its weights to no other job.",
)


async def observe_loan(job: Job, status: Json, facts: Facts) -> tuple[list[Json], Loan | None]:
    """Return the trainer that the job's replica is, if it has the job, and what it said."""
    lending, generation = status.get("lending") or {}, status.get("generation")
    if not lending.get("replica") or not generation:
        return [], None
    replica = facts.store.get(Ref("v1", "Pod", job.namespace, lending["replica"]))
    if replica is None or replica["status"].get("phase") in ("Failed", "Succeeded"):
        return [], None
    address = replica["status"].get("podIP")
    lender = await facts.trainers.lender(address) if address else None
    loan = lender.loan if lender else None
    if lender is not None and not _is_of(loan, job, generation):
        return [], None  # its process has started anew meanwhile
    crashes = int(lending.get("crashes") or 0)
    return [build_trainer(replica, loan, generation=generation, crashes=crashes)], loan


async def lend(step: Start, job: Job, facts: Facts, *, now: datetime) -> Lend | Queue:
    """Begin a generation on the replica with the fewest requests; return why it has to wait.

    Raises:
        LoanRefusedError: no replica of this deployment will ever take the job.
    """
    lenders = await _ask(_addresses(job, facts, now), facts)
    free = sorted(
        (lender.in_flight, name, address)
        for name, (address, lender) in lenders.items()
        if lender.is_free
    )
    for name, (address, lender) in lenders.items():
        if lender.is_free or not _is_of(lender.loan, job):
            continue
        if not _is_of(lender.loan, job, step.number):
            # Two at once would write to the same checkpoints.
            await facts.trainers.take_back(address)
            return Queue(_NO_REPLICA)
        free = [(0, name, address)]
    for _, name, address in free[:1]:
        if await facts.trainers.lend(address, build_train_config(job, step.number, workers=1)):
            return Lend(step.number, step.crashes, replica=name)
    return Queue(_NO_REPLICA)


def _addresses(job: Job, facts: Facts, now: datetime) -> dict[str, str]:
    """Return name and address of each replica in service."""
    name = job.spec.base_model.deployment or ""
    deployment = facts.store.get(Ref(API_VERSION, DEPLOYMENT_KIND, job.namespace, name))
    if deployment is None:
        return {}
    pods = facts.store.children(Key(DEPLOYMENT, job.namespace, name), "Pod")
    groups = read_groups(pods, owner_uid=uid_of(deployment), now=now)
    return {
        group.leader["metadata"]["name"]: group.address
        for group in groups
        if group.standing is Standing.IN_SERVICE and group.leader and group.address
    }


async def _ask(addresses: dict[str, str], facts: Facts) -> dict[str, tuple[str, Lender]]:
    """Return those that answer, with what they say."""
    answers = await asyncio.gather(*map(facts.trainers.lender, addresses.values()))
    found = zip(addresses.items(), answers, strict=True)
    return {name: (address, lender) for (name, address), lender in found if lender is not None}


def _is_of(loan: Loan | None, job: Job, generation: int | None = None) -> bool:
    if loan is None or loan.directory != checkpoint_folder(job):
        return False
    return generation is None or loan.generation == generation
