"""How far a job's adapter is on the deployment it was trained for, from that deployment's status.

The deployment's own controller loads adapters; a job only reads how far it is.
"""

from __future__ import annotations

from mizzen.operator.crds.common import Json
from mizzen.operator.status.job_facts import Problem, Promotion
from mizzen.operator.status.progress import Progress
from mizzen.operator.status.reasons import Reason


def promotion_target(job: Json) -> str | None:
    """Return the deployment that shall serve the job's result, None where there is none."""
    wanted = job["spec"].get("promotion") or {}
    if wanted.get("strategy", "HotLoadAdapter") == "None":
        return None
    return wanted.get("deployment")


def find_promotion(
    job: Json, progress: Progress | None, deployment: Json | None
) -> Promotion | None:
    """Return how far the promotion is, None where there is nothing to promote (yet).

    `deployment` is the target as last seen, None where it does not exist.
    """
    target = promotion_target(job)
    if target is None:
        return None
    if progress is None or progress.artifact is None:
        return None
    name = job["metadata"]["name"]
    if deployment is None:
        return Promotion(
            target, name, 0, 0,
            Problem(
                Reason.DEPLOYMENT_NOT_FOUND,
                f"spec.promotion.deployment names {target}, but this namespace has no "
                "LLMDeployment of that name. The result stays published; create the deployment "
                "and it is loaded there.",
            ),
        )  # fmt: skip
    status = deployment.get("status") or {}
    served = deployment["spec"]["model"].get("servedName") or target
    for adapter in status.get("adapters") or []:
        if adapter["name"] == name and adapter.get("digest") == progress.artifact.digest:
            problem = None
            if error := adapter.get("error"):
                problem = Problem(Reason.ADAPTER_REFUSED, str(error))
            return Promotion(
                target, f"{served}:{name}",
                ready_replicas=int(adapter.get("readyReplicas", 0)),
                replicas=int(status.get("readyReplicas", 0)),
                problem=problem,
            )  # fmt: skip
    return Promotion(target, f"{served}:{name}", 0, int(status.get("readyReplicas", 0)))
