"""One look at a FineTuneJob: what it says, what its pods say, what it still lacks."""

from __future__ import annotations

from dataclasses import dataclass

from mizzen.operator.controllers.job_inputs import (
    find_base_model,
    find_judge,
    find_obstacle,
    find_rollout,
    find_teacher,
    missing_input,
)
from mizzen.operator.controllers.job_loan import observe_loan
from mizzen.operator.controllers.job_queue import find_wait, missing_queue
from mizzen.operator.crds.common import Json
from mizzen.operator.desired.train_config import Job
from mizzen.operator.engine.key import Key
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import uid_of
from mizzen.operator.planning.generations import Generation
from mizzen.operator.planning.lending import Wait
from mizzen.operator.routing import JOB
from mizzen.operator.specs import InvalidSpecError
from mizzen.operator.status.job_facts import Problem
from mizzen.operator.status.loans import Loan
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.trainer_pods import leader_of, newest_generation


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at a job and its pods."""

    resource: Json
    job: Job | None
    pods: list[Json]
    newest: Generation | None
    problem: Problem | None
    loan: Loan | None = None  # what its replica said, in mode Loan
    wait: Wait | None = None  # why Kueue holds its pods back

    @property
    def status(self) -> Json:
        """The status as it was last written."""
        return self.resource.get("status") or {}

    @property
    def key(self) -> Key:
        """The job's key."""
        metadata = self.resource["metadata"]
        return Key(JOB, metadata["namespace"], metadata["name"])

    @property
    def pod(self) -> Json | None:
        """The newest generation's pod that speaks for all."""
        return leader_of(self.pods)


async def observe(key: Key, resource: Json, kube: Kube, facts: Facts) -> Observed:
    """Gather what the decision needs; the API server is asked only before a job's pods run."""
    pods = facts.store.children(key, "Pod")
    newest = newest_generation(pods, resource.get("status") or {})
    try:
        spec = facts.specs.job(resource)
    except InvalidSpecError as error:
        return Observed(resource, None, pods, newest, Problem(Reason.INVALID_SPEC, str(error)))
    base = find_base_model(
        spec, key.namespace, facts.store, begun_with=_begun_with(resource.get("status") or {})
    )
    if isinstance(base, Problem):
        return Observed(resource, None, pods, newest, base)
    url = facts.config.gateway_url
    judge = find_judge(spec, key.namespace, facts.store, gateway_url=url)
    if isinstance(judge, Problem):
        return Observed(resource, None, pods, newest, judge)
    teacher = find_teacher(spec, key.namespace, facts.store, gateway_url=url)
    if isinstance(teacher, Problem):
        return Observed(resource, None, pods, newest, teacher)
    rollout = find_rollout(spec, key.namespace, facts.store)
    if isinstance(rollout, Problem):
        return Observed(resource, None, pods, newest, rollout)
    created_at = str(resource["metadata"]["creationTimestamp"])
    identity = (key.namespace, key.name, uid_of(resource))
    job = Job(*identity, spec, base, created_at, judge, teacher, rollout)
    loan = None
    if spec.mode == "Loan":
        pods, loan = await observe_loan(job, resource.get("status") or {}, facts)
        newest = newest_generation(pods, resource.get("status") or {})
        if (obstacle := find_obstacle(job, facts.store)) is not None and not pods:
            return Observed(resource, job, pods, newest, obstacle)
    problem = None if pods else await missing_input(job, kube) or await missing_queue(job, kube)
    wait = await find_wait(job, pods, kube)
    return Observed(resource, job, pods, newest, problem, loan, wait)


def _begun_with(status: Json) -> str | None:
    """Return the base model of a job whose first run has begun."""
    return status.get("baseModel") if status.get("generation") else None
