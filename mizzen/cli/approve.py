"""`kubectl mizzen approve`: a person lets a job's result be served.

The approval is an annotation on the job, so a user needs no rights but those to change it; who it
really was stands in the API server's audit log.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mizzen.cli.kubectl import Context, Kubectl, KubectlError, Namespace, run

Name = Annotated[str, typer.Argument(metavar="NAME", help="The FineTuneJob.")]


def approve(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Let the result of a job with promotion.approval Manual be served."""
    run(_approve, name, namespace, context)


def _approve(kubectl: Kubectl, name: str) -> str:
    from mizzen.operator.planning.promotions import APPROVE, approver_of, needs_approval

    job = kubectl.get("finetunejob", name)
    if not needs_approval(job):
        raise KubectlError(f"{name} needs no approval: its promotion.approval is not Manual.")
    conditions = (job.get("status") or {}).get("conditions") or []
    for failed in (c for c in conditions if (c["type"], c["status"]) == ("Failed", "True")):
        raise KubectlError(
            f"{name} has failed, so its result is not served; submit the job anew. "
            f"{failed['message']}"
        )
    if (before := approver_of(job)) is not None:
        return f"{name} was approved by {before}."
    user = json.loads(kubectl("auth", "whoami", "-o", "json"))["status"]["userInfo"]["username"]
    kubectl("annotate", "finetunejob", name, f"{APPROVE}={user}")
    return f"{name} is approved by {user}."
