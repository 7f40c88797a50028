"""Brings a FineTuneJob one step closer to its result: observe, decide, apply, report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from mizzen.operator.controllers.job_inputs import (
    find_base_model,
    find_judge,
    find_teacher,
    missing_input,
)
from mizzen.operator.controllers.job_lending import (
    lending_of,
    preemptions_of,
    reclaimed_at,
    request_of,
)
from mizzen.operator.crds.common import API_VERSION, Json
from mizzen.operator.crds.finetunejob import KIND
from mizzen.operator.crds.llmdeployment import KIND as DEPLOYMENT_KIND
from mizzen.operator.desired.jobs import (
    Worker,
    artifact_uri,
    build_config_map,
    build_trainer_pod,
    generation_name,
)
from mizzen.operator.desired.train_config import Job
from mizzen.operator.desired.workers import build_workers_policy, build_workers_service
from mizzen.operator.engine.key import Key
from mizzen.operator.engine.results import Done, Requeue, Result, Retryable
from mizzen.operator.facts import Facts
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref, uid_of
from mizzen.operator.kube.errors import KubeError
from mizzen.operator.kube.events import Event
from mizzen.operator.planning.generations import (
    AskToYield,
    Dismiss,
    Fence,
    Finish,
    Generation,
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
    with_lending,
)
from mizzen.operator.planning.lending import Wait
from mizzen.operator.routing import JOB, PROMOTES_TO, ref_of
from mizzen.operator.specs import InvalidSpecError
from mizzen.operator.status.causes import pod_cause, terminated_cause
from mizzen.operator.status.conditions import ConditionType, Document, flips, rfc3339
from mizzen.operator.status.finetunejob import has_ended, next_status
from mizzen.operator.status.job_facts import JobFacts, Problem, Promotion
from mizzen.operator.status.progress import Progress, parse_progress
from mizzen.operator.status.promotion import find_promotion, promotion_target
from mizzen.operator.status.reasons import Reason
from mizzen.operator.status.trainer_pods import (
    generation_of,
    last_progress,
    leader_of,
    newest_generation,
    newest_pods,
    outcome_of,
    pods_of,
    rank_of,
    size_of,
    telling_pod,
    termination_of,
)

_POLL_S = 3.0
_MISSING_INPUT_S = 15.0
_YIELD_DEADLINE_S = 60
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


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at a job and its pods."""

    resource: Json
    job: Job | None
    pods: list[Json]
    newest: Generation | None
    problem: Problem | None

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
        step = await apply(step, observed, kube, facts)
    except KubeError as error:
        if not error.retry:
            refused = Problem(Reason.POD_REFUSED, str(error))
            await report(observed, None, kube, facts, now, problem=refused)
            return Requeue(_MISSING_INPUT_S)
        return Retryable(error)
    await report(observed, step, kube, facts, now)
    return _next_look(step, observed, now)


async def observe(key: Key, resource: Json, kube: Kube, facts: Facts) -> Observed:
    """Gather what the decision needs; the API server is asked only before a job has pods."""
    pods = facts.store.children(key, "Pod")
    newest = newest_generation(pods, resource.get("status") or {})
    try:
        spec = facts.specs.job(resource)
    except InvalidSpecError as error:
        return Observed(resource, None, pods, newest, Problem(Reason.INVALID_SPEC, str(error)))
    base = find_base_model(spec, key.namespace, facts.store)
    if isinstance(base, Problem):
        return Observed(resource, None, pods, newest, base)
    url = facts.config.gateway_url
    judge = find_judge(spec, key.namespace, facts.store, gateway_url=url)
    if isinstance(judge, Problem):
        return Observed(resource, None, pods, newest, judge)
    teacher = find_teacher(spec, key.namespace, facts.store, gateway_url=url)
    if isinstance(teacher, Problem):
        return Observed(resource, None, pods, newest, teacher)
    created_at = str(resource["metadata"]["creationTimestamp"])
    identity = (key.namespace, key.name, uid_of(resource))
    job = Job(*identity, spec, base, created_at, judge, teacher)
    problem = None if pods else await missing_input(job, kube)
    return Observed(resource, job, pods, newest, problem)


def decide(observed: Observed, facts: Facts, now: datetime) -> Step | None:
    """Return what to do next, None while something it needs is missing."""
    job = observed.job
    if job is None or observed.problem is not None:
        facts.ledger.withdraw(observed.key)
        return None
    step = decide_generation(
        observed.newest,
        is_suspended=job.spec.suspend,
        backoff_limit=job.spec.failure.backoff_limit,
        now=now,
        workers=Range(job.spec.workers.min, job.spec.workers.max),
    )
    wait = None
    if not isinstance(step, Start) or isinstance(step, Shrink):
        facts.ledger.withdraw(observed.key)
    else:
        made = pods_of(observed.pods, step.number)
        if request := request_of(observed.resource, job, made=made):
            wait = facts.ledger.ask(observed.key, request)
    return with_lending(
        step,
        wait=wait,
        reclaimed_at=reclaimed_at(observed.pod),
        yield_within_s=job.spec.spare_capacity.yield_within_seconds,
        now=now,
    )


async def apply(step: Step | None, observed: Observed, kube: Kube, facts: Facts) -> Step | None:
    """Carry a step out; return it, or what was done instead since its devices are gone."""
    job = observed.job
    if job is None:
        return step
    match step:
        case Start(number):
            if (wait := await _start(step, observed, kube, facts)) is not None:
                return Queue(wait)
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


async def _start(step: Start, observed: Observed, kube: Kube, facts: Facts) -> Wait | None:
    """Make a generation's pods; return why they have to wait after all, if they do."""
    job, number = observed.job, step.number
    assert job is not None
    # What an operator that died in between has made already says how many there shall be.
    made = pods_of(observed.pods, number)
    workers = size_of(made[0]) if made else step.workers
    await facts.namespaces.prepare(job.namespace, kube)
    if workers > 1:
        await kube.apply(build_workers_policy(job))
        await kube.apply(build_workers_service(job))
    await kube.create(build_config_map(job, number, workers=workers))
    missing = sorted(set(range(workers)) - {rank_of(pod) for pod in made})
    async with facts.ledger.handing_out:
        if (wait := facts.ledger.wait_of(observed.key)) is not None:
            return wait  # a look that has just ended gave the devices to somebody else
        hostnames = dict(zip(missing, facts.ledger.take(observed.key), strict=False))
        for rank in missing:
            worker = Worker(
                generation=number,
                workers=workers,
                rank=rank,
                crashes=step.crashes,
                preemptions=preemptions_of(observed.resource),
                hostname=hostnames.get(rank, ""),
            )
            await kube.create(
                build_trainer_pod(
                    job,
                    worker,
                    image=facts.config.runtime_image,
                    pull_policy=facts.config.image_pull_policy,
                )
            )
    return None


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
    # Not running yet, or deaf: SIGTERM means the same to a trainer.
    await _dismiss(pod, kube)


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
        promotion=_promotion(observed, progress, facts, now),
        lending=lending_of(observed.job, observed.pod, step, now=now),
    )
    await _write(observed, job_facts, kube, now)


async def report_ended(observed: Observed, kube: Kube, facts: Facts, now: datetime) -> Result:
    """Follow the promotion of a job whose training is over; its pods may be long gone."""
    progress = progress_of(observed.status)
    if progress is None or progress.artifact is None:
        return Done()  # failed: its status is final
    promotion = _promotion(observed, progress, facts, now)
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


def _promotion(
    observed: Observed, progress: Progress | None, facts: Facts, now: datetime
) -> Promotion | None:
    target = promotion_target(observed.resource) or ""
    namespace = observed.resource["metadata"]["namespace"]
    deployment = facts.store.get(Ref(API_VERSION, DEPLOYMENT_KIND, namespace, target))
    jobs = facts.store.lookup(KIND, PROMOTES_TO, namespace, target)
    return find_promotion(observed.resource, progress, deployment, jobs, now=now)


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
        case Watch() | AskToYield() | Start() | Queue() | Fence() | Dismiss():
            return Requeue(_POLL_S)
        case WaitUntil(at):
            return Requeue(max(1.0, (at - now).total_seconds()))
        case Finish():
            return Requeue(_POLL_S)
        case Rest() | GiveUp():
            return Done()
