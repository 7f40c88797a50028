"""How far a job's result is on the deployment it was trained for, from that deployment's status.

The deployment's own controller serves results; a job only reads how far it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from mizzen.operator.crds.common import Json
from mizzen.operator.planning.promotions import (
    MODEL,
    approver_of,
    choose_holders,
    needs_approval,
    place_of,
    promoted_at,
)
from mizzen.operator.status.conditions import ConditionType, condition_status, rfc3339
from mizzen.operator.status.job_facts import Approval, Problem, Promotion
from mizzen.operator.status.progress import Artifact, Progress
from mizzen.operator.status.reasons import Reason


def promotion_target(job: Json) -> str | None:
    """Return the deployment that shall serve the job's result, None where there is none."""
    wanted = job["spec"].get("promotion") or {}
    if wanted.get("strategy", "HotLoadAdapter") == "None":
        return None
    return wanted.get("deployment")


def find_promotion(
    job: Json,
    progress: Progress | None,
    deployment: Json | None,
    jobs: Iterable[Json],
    *,
    now: datetime,
) -> Promotion | None:
    """Return how far the promotion is, None where there is nothing to promote (yet).

    `deployment` is the target as last seen, None where it does not exist; `jobs` are all that
    promote to it.
    """
    target = promotion_target(job)
    if target is None or progress is None or progress.artifact is None:
        return None
    place, approval = place_of(job), _approval(job, now)
    if deployment is None:
        return Promotion(target, place or target, problem=_no_deployment(target), approval=approval)
    served = deployment["spec"]["model"].get("servedName") or target
    name = served if place == MODEL else f"{served}:{place}"
    if needs_approval(job) and approval is None:
        return Promotion(target, name, problem=_not_approved(job["metadata"]["name"]))
    if promoted_at(job) is None:
        # Its own status does not say yet that it is published, so no name can be its own.
        return Promotion(target, name, approval=approval)
    holder = choose_holders(jobs).get(place)
    if holder is not None and holder["metadata"]["uid"] != job["metadata"]["uid"]:
        return _not_holding(job, holder, target, name, approval)
    found = _model if place == MODEL else _adapter
    ready, replicas, problem = found(job, progress.artifact, deployment)
    conditions = (job.get("status") or {}).get("conditions") or []
    was_done = condition_status(conditions, ConditionType.PROMOTED) == "True"
    before = (job.get("status") or {}).get("promotion") or {}
    return Promotion(
        target,
        name,
        ready,
        replicas,
        problem,
        approval,
        was_done=was_done,
        on_trial_since=before.get("onTrialSince"),
    )


def _approval(job: Json, now: datetime) -> Approval | None:
    by = approver_of(job)
    if by is None or not needs_approval(job):
        return None
    before = (job.get("status") or {}).get("promotion") or {}
    at = before.get("approvedAt") if before.get("approvedBy") == by[:253] else None
    return Approval(by[:253], at or rfc3339(now))


def _not_holding(
    job: Json, holder: Json, target: str, name: str, approval: Approval | None
) -> Promotion:
    own, other = job["metadata"]["name"], holder["metadata"]["name"]
    if holder["spec"]["promotion"].get("replaces") == own:
        return Promotion(target, name, approval=approval, replaced_by=other)
    problem = Problem(
        Reason.PROMOTION_TAKEN,
        f"{name} is the result of job {other}. Say so in a job's promotion.replaces, choose "
        f"another promotion.adapter, or delete job {other}.",
    )
    return Promotion(target, name, problem=problem, approval=approval)


def _adapter(job: Json, artifact: Artifact, deployment: Json) -> tuple[int, int, Problem | None]:
    status = deployment.get("status") or {}
    replicas = int(status.get("readyReplicas", 0))
    for adapter in status.get("adapters") or []:
        if adapter["name"] == place_of(job) and adapter.get("digest") == artifact.digest:
            error = adapter.get("error")
            problem = Problem(Reason.ADAPTER_REFUSED, str(error)) if error else None
            return int(adapter.get("readyReplicas", 0)), replicas, problem
    return 0, replicas, None


def _model(job: Json, artifact: Artifact, deployment: Json) -> tuple[int, int, Problem | None]:
    status = deployment.get("status") or {}
    replicas, rollout = int(status.get("readyReplicas", 0)), status.get("rollout")
    promoted = status.get("promotedModel") or {}
    if promoted.get("job") != job["metadata"]["name"] or promoted["digest"] != artifact.digest:
        return 0, replicas, None
    if rollout is None or rollout["revision"] != promoted["revision"]:
        return replicas, replicas, None  # where there is a rollout, both its revisions serve it
    failure = rollout.get("failure")
    if failure is None:
        return 0, replicas, None
    return (
        0,
        replicas,
        Problem(
            Reason.ROLLED_BACK,
            f"The deployment was rolled back to the model before: {failure['message']}",
            is_final=True,
        ),
    )


def _no_deployment(target: str) -> Problem:
    return Problem(
        Reason.DEPLOYMENT_NOT_FOUND,
        f"spec.promotion.deployment names {target}, but this namespace has no LLMDeployment of "
        "that name. The result stays published; create the deployment and it is served there.",
    )


def _not_approved(job: str) -> Problem:
    return Problem(
        Reason.APPROVAL_NEEDED,
        "The result is published and waits for a person: look at status.evaluation, then run "
        f"`kubectl mizzen approve {job}`.",
    )
