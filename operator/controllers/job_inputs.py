"""What a job needs before its first pod: the base model, its volumes, its data."""

from __future__ import annotations

from mizzen.operator.crds.common import API_VERSION, Json
from mizzen.operator.crds.finetunejob import KIND as JOB_KIND
from mizzen.operator.crds.finetunejob import FineTuneJobSpec
from mizzen.operator.crds.llmdeployment import KIND as DEPLOYMENT_KIND
from mizzen.operator.desired.labels import HTTP_PORT
from mizzen.operator.desired.sources import locate_model
from mizzen.operator.desired.train_config import Job, config_map_of
from mizzen.operator.kube.client import Kube
from mizzen.operator.kube.documents import Ref
from mizzen.operator.kube.store import Store
from mizzen.operator.planning.promotions import served_model
from mizzen.operator.routing import PROMOTES_TO
from mizzen.operator.status.job_facts import Problem
from mizzen.operator.status.reasons import Reason


def find_base_model(
    spec: FineTuneJobSpec, namespace: str, store: Store, *, begun_with: str | None
) -> str | Problem:
    """Return the address of the model to start from, or why there is none.

    A deployment's model is the one that it serves, which may be a job's result. A job that has
    `begun_with` one goes on with it: its checkpoints fit no other.
    """
    if spec.base_model.source is not None:
        return spec.base_model.source
    if begun_with is not None:
        return begun_with
    name = spec.base_model.deployment or ""
    deployment = store.get(Ref(API_VERSION, DEPLOYMENT_KIND, namespace, name))
    if deployment is None:
        return Problem(
            Reason.BASE_MODEL_NOT_FOUND,
            f"spec.baseModel.deployment names {name}, but this namespace has no LLMDeployment of "
            "that name. Create it, or give spec.baseModel.source.",
        )
    jobs = store.lookup(JOB_KIND, PROMOTES_TO, namespace, name)
    source = served_model(jobs) or str(deployment["spec"]["model"]["source"])
    if locate_model(source).is_remote:
        return Problem(
            Reason.BASE_MODEL_NOT_FOUND,
            f"LLMDeployment {name} fetches its model from {source}, and a job trains only what "
            "lies on a claim. Copy the model to one and give spec.baseModel.source.",
        )
    return source


def find_judge(
    spec: FineTuneJobSpec, namespace: str, store: Store, *, gateway_url: str
) -> Json | Problem | None:
    """Return where the judge of the job's suites is and its name there, None without a judge."""
    judge = spec.evaluation.judge if spec.evaluation else None
    if judge is None:
        return None
    found = _find_served(judge.deployment, namespace, store, gateway_url=gateway_url)
    if isinstance(found, str):
        return Problem(Reason.JUDGE_NOT_FOUND, f"evaluation.judge names {found}")
    return found


def find_teacher(
    spec: FineTuneJobSpec, namespace: str, store: Store, *, gateway_url: str
) -> Json | Problem | None:
    """Return where the deployment that teaches is and its name there, None without one."""
    name = spec.distill.deployment if spec.distill else None
    if name is None:
        return None
    found = _find_served(name, namespace, store, gateway_url=gateway_url)
    if isinstance(found, str):
        return Problem(Reason.TEACHER_NOT_FOUND, f"distill.deployment names {found}")
    return found


def find_rollout(spec: FineTuneJobSpec, namespace: str, store: Store) -> Json | Problem | None:
    """Return where the replicas are that draw the job's answers, None where the trainer does.

    Whether they serve the job's base model is theirs to say, by the digest of its weights.
    """
    if spec.rl is None or spec.rl.rollout is None:
        return None
    name = spec.rl.rollout.deployment
    deployment = store.get(Ref(API_VERSION, DEPLOYMENT_KIND, namespace, name))
    if deployment is None:
        return Problem(
            Reason.ROLLOUT_NOT_FOUND,
            f"rl.rollout names {name}, but this namespace has no LLMDeployment of that name. "
            "Create it or correct the name.",
        )
    if (deployment["spec"].get("parallelism") or {}).get("nodes", 1) > 1:
        return Problem(
            Reason.ROLLOUT_REFUSED,
            f"rl.rollout names {name}, whose replicas have several pods each and take no policy. "
            "Name a deployment with spec.parallelism.nodes 1.",
        )
    return {"url": f"http://{name}.{namespace}.svc:{HTTP_PORT}"}


def _find_served(name: str, namespace: str, store: Store, *, gateway_url: str) -> Json | str:
    """Return where a deployment is asked, or its name with what is wrong."""
    deployment = store.get(Ref(API_VERSION, DEPLOYMENT_KIND, namespace, name))
    if deployment is None:
        return (
            f"{name}, but this namespace has no LLMDeployment of that name. Create it or correct "
            "the name."
        )
    if not gateway_url:
        return (
            f"{name}, which is asked through the gateway, and the operator knows of none. Set "
            "MIZZEN_GATEWAY_URL on the operator."
        )
    return {"url": gateway_url, "model": deployment["spec"]["model"].get("servedName") or name}


def find_obstacle(job: Job, store: Store) -> Problem | None:
    """Return why the replicas of a base's deployment cannot train this job, None where they can."""
    name = job.spec.base_model.deployment or ""
    deployment = store.get(Ref(API_VERSION, DEPLOYMENT_KIND, job.namespace, name))
    if deployment is None:
        return None  # without it there is no base model either
    if not (deployment["spec"].get("engine") or {}).get("lendsWeights"):
        return Problem(
            Reason.LENDS_NO_WEIGHTS,
            f"LLMDeployment {name} lends its weights to no job. Set spec.engine.lendsWeights "
            "there, or leave mode: Loan out.",
        )
    claim = locate_model(job.base_source).claim
    if others := sorted(set(job.claims) - {claim}):
        return Problem(
            Reason.LENDS_NO_WEIGHTS,
            f"The job uses {', '.join(others)}, and the replicas of {name} write to the claim of "
            f"the model alone ({claim or 'none, as it is part of the image'}). Put data and result "
            "there, or leave mode: Loan out.",
        )
    return None


async def missing_input(job: Job, kube: Kube) -> Problem | None:
    """Ask the API server for every claim and ConfigMap; return the first that is not there."""
    for claim in job.claims:
        if await kube.get(Ref("v1", "PersistentVolumeClaim", job.namespace, claim)) is None:
            return Problem(
                Reason.CLAIM_NOT_FOUND,
                f"The job mounts the volume claim {claim}, but this namespace has none of that "
                "name. Create it or correct the pvc:// address.",
            )
    for dataset in job.spec.dataset:
        name, key = config_map_of(dataset)
        if not name:
            continue
        config_map = await kube.get(Ref("v1", "ConfigMap", job.namespace, name))
        if config_map is None:
            return Problem(
                Reason.DATASET_NOT_FOUND,
                f"Dataset {dataset.name} is in the ConfigMap {name}, but this namespace has none "
                "of that name. Create it or correct the dataset's uri.",
            )
        keys = {*config_map.get("data", {}), *config_map.get("binaryData", {})}
        if key not in keys:
            return Problem(
                Reason.DATASET_NOT_FOUND,
                f"Dataset {dataset.name} is the key {key} of the ConfigMap {name}, which has "
                f"{', '.join(sorted(keys)) or 'no keys'}. Correct the dataset's uri.",
            )
    return None
