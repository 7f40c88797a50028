"""Brings a FineTuneJob one step closer to its result: observe, decide, apply, report."""

from __future__ import annotations

from datetime import datetime

from mizzen.operator.controllers.job_apply import apply
from mizzen.operator.controllers.job_lending import (
    lending_of,
    reclaimed_at,
    request_for_more,
    request_of,
)
from mizzen.operator.controllers.job_observe import Observed, observe
from mizzen.operator.controllers.job_probes import probe_promotion
from mizzen.operator.controllers.job_trial import watch_trial
from mizzen.operator.crds.common import API_VERSION, Json
from mizzen.operator.crds.finetunejob import KIND
from mizzen.operator.crds.llmdeployment import KIND as DEPLOYMENT_KIND
from mizzen.operator.desired.jobs import (
    artifact_uri,
)
from mizzen.operator.engine.key import Key
from mizzen.operator.engine.results import Done, Requeue, Result, Retryable
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref
from mizzen.operator.kube.errors import KubeError
from mizzen.operator.kube.events import Event
from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Fence,
    Finish,
    GiveUp,
    Outcome,
    Queue,
    Range,
    Rest,
    Shrink,
    Start,
    Step,
    WaitUntil,
    Watch,
    decide_generation,
    may_grow,
    with_lending,
)
from mizzen.operator.routing import PROMOTES_TO, ref_of
from mizzen.operator.status.causes import pod_cause, terminated_cause
from mizzen.operator.status.conditions import ConditionType, Document, flips, rfc3339
from mizzen.operator.status.finetunejob import has_ended, next_status
from mizzen.operator.status.job_facts import JobFacts, Problem, Promotion
from mizzen.operator.status.loans import progress_of as loan_progress
from mizzen.operator.status.progress import Progress, parse_progress
from mizzen.operator.status.promotion import find_promotion, promotion_target
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.trainer_pods import (
    last_progress,
    newest_pods,
    pods_of,
    telling_pod,
    termination_of,
)
from mizzen.operator.trainers import LoanRefusedError

_POLL_S = 3.0
_MISSING_INPUT_S = 15.0
_QUEUE_S = 15.0
_NO_RESULT = (
    "The trainer ended well but left no result in its last words, so nothing can be published. "
    "Its log says more; submit the job anew to go on."
)
_EVENT_CONDITIONS = (
    ConditionType.ACCEPTED,
    ConditionType.ADMITTED,
    ConditionType.SUSPENDED,
    ConditionType.EVALUATION_PASSED,
    ConditionType.PUBLISHED,
    ConditionType.PROMOTED,
    ConditionType.SUCCEEDED,
    ConditionType.FAILED,
)


async def reconcile(key: Key, *, kube: Kube, facts: Facts, now: datetime) -> Result:
    """Bring one job closer to its result; safe to repeat, safe to interrupt."""
    resource = facts.store.get(ref_of(key))
    if resource is None or "deletionTimestamp" in resource["metadata"]:
        facts.ledger.withdraw(key)
        return Done()  # ownerReferences take the children with it
    observed = await observe(key, resource, kube, facts)
    if has_ended(observed.status):
        facts.ledger.withdraw(key)
        return await report_ended(observed, kube, facts, now)
    step = decide(observed, facts, now)
    try:
        step = await apply(step, observed, kube, facts, now=now)
    except LoanRefusedError as error:
        refused = Problem(Reason.LOAN_REFUSED, str(error), is_final=True)
        await report(observed, None, kube, facts, now, problem=refused)
        return Done()
    except KubeError as error:
        if not error.retry:
            refused = Problem(Reason.POD_REFUSED, str(error))
            await report(observed, None, kube, facts, now, problem=refused)
            return Requeue(_MISSING_INPUT_S)
        return Retryable(error)
    await report(observed, step, kube, facts, now)
    return _next_look(step, observed, now)


def decide(observed: Observed, facts: Facts, now: datetime) -> Step | None:
    """Return what to do next, None while something it needs is missing."""
    job = observed.job
    if job is None or observed.problem is not None:
        facts.ledger.withdraw(observed.key)
        return None
    spec = job.spec
    workers = Range(spec.workers.min, spec.workers.max, tensor=spec.parallelism.tensor)
    step = decide_generation(
        observed.newest,
        is_suspended=spec.suspend,
        backoff_limit=spec.failure.backoff_limit,
        now=now,
        workers=workers,
    )
    wait = None
    if isinstance(step, Start) and not isinstance(step, Shrink):
        made = pods_of(observed.pods, step.number)
        if request := request_of(observed.resource, job, made=made):
            wait = facts.ledger.ask(observed.key, request)
    elif isinstance(step, Watch) and may_grow(observed.newest, workers, now=now):
        step = _grow(step, observed, facts)
    else:
        facts.ledger.withdraw(observed.key)
    if isinstance(step, Watch) and observed.wait is not None:
        return Queue(observed.wait)
    return with_lending(
        step,
        wait=wait,
        reclaimed_at=reclaimed_at(observed.pod),
        # Kueue has deleted the pods that it takes the quota of: their grace period is the limit.
        yield_within_s=None if spec.queue else spec.spare_capacity.yield_within_seconds,
        now=now,
    )


def _grow(step: Watch, observed: Observed, facts: Facts) -> Step:
    """Return a yield where there is room for a larger generation."""
    assert observed.job is not None, "only a job with a valid spec runs on"
    assert observed.newest is not None, "it runs"
    workers = observed.newest.workers
    more = request_for_more(observed.resource, observed.job, workers=workers)
    has_room = more is not None and facts.ledger.offers(observed.key, more)
    return AskToYield() if has_room else step


async def report(
    observed: Observed,
    step: Step | None,
    kube: Kube,
    facts: Facts,
    now: datetime,
    *,
    problem: Problem | None = None,
) -> None:
    """Write what was decided and seen, if it differs, and tell people about flips."""
    progress = await _progress(step, observed, facts)
    artifact = progress.artifact if progress else None
    newest = observed.newest
    if isinstance(step, Start):
        newest = None  # its own pod is not seen yet
    job_facts = JobFacts(
        step=step,
        newest=newest,
        is_suspended=bool(observed.job and observed.job.spec.suspend),
        problem=problem or observed.problem or _pod_problem(step, observed),
        progress=progress,
        artifact_uri=artifact_uri(artifact.path) if artifact else None,
        copies=tuple(map(artifact_uri, artifact.copies)) if artifact else (),
        has_suites=_has_suites(observed),
        promotion=await _promotion(observed, progress, facts, now),
        lending=lending_of(observed.resource, observed.job, observed.pods, step, now=now),
    )
    await _write(observed, job_facts, kube, now)


async def report_ended(observed: Observed, kube: Kube, facts: Facts, now: datetime) -> Result:
    """Follow the promotion of a job whose training is over; its pods may be long gone."""
    progress = progress_of(observed.status)
    if progress is None or progress.artifact is None or observed.status.get("phase") == "Failed":
        return Done()  # its status is final, also where a result was taken back
    promotion = await _promotion(observed, progress, facts, now)
    job_facts = JobFacts(
        step=Finish(),
        newest=observed.newest,
        is_suspended=False,
        problem=None,
        progress=progress,
        artifact_uri=progress.artifact.path,
        copies=progress.artifact.copies,
        has_suites=_has_suites(observed),
        promotion=promotion,
    )
    await _write(observed, job_facts, kube, now)
    # What a promotion waits for may also be another job's business, which is no event of ours.
    is_over = promotion is None or promotion.is_done or promotion.has_failed
    return Done() if is_over else Requeue(_POLL_S)


async def _promotion(
    observed: Observed, progress: Progress | None, facts: Facts, now: datetime
) -> Promotion | None:
    target = promotion_target(observed.resource) or ""
    namespace = observed.resource["metadata"]["namespace"]
    deployment = facts.store.get(Ref(API_VERSION, DEPLOYMENT_KIND, namespace, target))
    jobs = facts.store.lookup(KIND, PROMOTES_TO, namespace, target)
    found = find_promotion(observed.resource, progress, deployment, jobs, now=now)
    if found is None or deployment is None:
        return found
    probed = await probe_promotion(found, observed.resource, deployment, facts, now)
    return await watch_trial(probed, observed.resource, deployment, facts, now)


async def _write(observed: Observed, job_facts: JobFacts, kube: Kube, now: datetime) -> None:
    resource, previous = observed.resource, observed.status
    generation = int(resource["metadata"]["generation"])
    status = next_status(previous, job_facts, generation=generation, now=now)
    if observed.job is not None:
        status["baseModel"] = observed.job.base_source
    await kube.apply_status(resource, status)
    for event in _events(resource, previous, status, now):
        await kube.create_event(event)


def _events(resource: Json, previous: Json, status: Document, now: datetime) -> list[Event]:
    conditions = status["conditions"]
    assert isinstance(conditions, list)
    changed = flips(previous.get("conditions") or [], conditions, of=_EVENT_CONDITIONS)
    return [
        Event(
            about=resource,
            reason=flip.reason,
            message=flip.message,
            is_warning=flip.is_warning,
            at=rfc3339(now),
        )
        for flip in changed
        if flip.status == "True" or flip.is_warning or flip.reason == Reason.YIELDED
    ]


async def _progress(step: Step | None, observed: Observed, facts: Facts) -> Progress | None:
    pod = observed.pod
    if pod is None:
        return None
    if isinstance(step, Finish | Rest | Queue | Start | WaitUntil):
        return last_progress(pod)
    if observed.job is not None and observed.job.spec.mode == "Loan":
        return loan_progress(observed.loan)
    address = pod.get("status", {}).get("podIP")
    if isinstance(step, Watch | AskToYield) and address:
        return await facts.trainers.progress(address)
    return None


def progress_of(status: Json) -> Progress | None:
    """Return the last progress of an ended job from its own status, None where it had none."""
    if not isinstance(artifact := status.get("artifact"), dict):
        return None
    return parse_progress(
        {
            **status.get("progress", {}),
            **status.get("metrics", {}),
            "phase": "Succeeded",
            "checkpoint": status.get("checkpoint"),
            "evaluation": status.get("evaluation"),
            "artifact": {**artifact, "path": artifact["uri"]},
        }
    )


def _pod_problem(step: Step | None, observed: Observed) -> Problem | None:
    pod = observed.pod
    if pod is None:
        return None
    if isinstance(step, Finish) and last_progress(pod) is None:
        return Problem(Reason.TRAINER_CRASHED, _NO_RESULT, is_final=True)
    if isinstance(step, GiveUp) and observed.newest is not None:
        pod = telling_pod(observed.pods, observed.newest.outcome) or pod
        last = terminated_cause(termination_of(pod), instance=observed.resource["metadata"]["name"])
        return Problem(last.reason, last.message, is_final=True)
    has_begun = observed.newest is not None and observed.newest.outcome is not Outcome.PENDING
    if isinstance(step, Watch) and not has_begun:
        causes = map(pod_cause, newest_pods(observed.pods))
        if cause := next(filter(None, causes), None):
            return Problem(cause.reason, cause.message)
    return None


def _has_suites(observed: Observed) -> bool:
    evaluation = (observed.resource.get("spec") or {}).get("evaluation") or {}
    return bool(evaluation.get("suites"))


def _next_look(step: Step | None, observed: Observed, now: datetime) -> Result:
    match step:
        case None:
            return Requeue(_MISSING_INPUT_S)
        case Queue() if observed.wait is not None:
            return Requeue(_QUEUE_S)  # its admission is an event of its pods
        case Watch() | AskToYield() | Start() | Queue() | Fence() | Dismiss():
            return Requeue(_POLL_S)
        case WaitUntil(at):
            return Requeue(max(1.0, (at - now).total_seconds()))
        case Finish():
            return Requeue(_POLL_S)
        case Rest() | GiveUp():
            return Done()
