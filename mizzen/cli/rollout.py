"""`kubectl mizzen rollout`: a deployment's revisions, and the way back to one of them.

It runs kubectl and changes nothing but the deployment's spec, so a user needs no rights but those
to edit it, and the operator needs no word of a past command.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import typer

from mizzen.cli.kubectl import Context, Json, Kubectl, KubectlError, Namespace, run

Name = Annotated[str, typer.Argument(metavar="NAME", help="The LLMDeployment.")]

app = typer.Typer(help="Revisions of an LLMDeployment.", no_args_is_help=True)


@app.command()
def history(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """List the revisions, the oldest first."""
    run(_history, name, namespace, context)


@app.command()
def undo(
    name: Name,
    to_revision: Annotated[
        int | None,
        typer.Option(min=1, help="Number in `history`; the one before the newest if left out."),
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Go back to an earlier revision; replicas, scaling, adapters and rollout stay as they are."""
    run(partial(_undo, number=to_revision), name, namespace, context)


@app.command()
def pause(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Bring no further replica to the newest revision; size and repairs go on."""
    run(partial(_set_paused, paused=True), name, namespace, context)


@app.command()
def resume(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Go on with a paused rollout."""
    run(partial(_set_paused, paused=False), name, namespace, context)


def _set_paused(kubectl: Kubectl, name: str, *, paused: bool) -> str:
    patch = {"spec": {"rollout": {"paused": paused}}}
    kubectl("patch", "llmdeployment", name, "--type=merge", "-p", json.dumps(patch))
    return f"{name} is paused." if paused else f"{name} goes on."


def _history(kubectl: Kubectl, name: str) -> str:
    resource = kubectl.get("llmdeployment", name)
    revisions = _revisions(kubectl, resource)
    if not revisions:
        return f"{name} has had one revision so far."
    rows = [("REVISION", "HASH", "MODEL", "IMAGE", "STATE")]
    for number, revision in revisions.items():
        spec = revision["data"]["spec"]
        image = (spec.get("engine") or {}).get("image") or revision["data"]["image"]
        hash_ = revision["metadata"]["labels"]["mizzen.dev/revision"]
        rows.append((str(number), hash_, spec["model"]["source"], image, _state(resource, hash_)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _state(resource: Json, hash_: str) -> str:
    return "current" if resource["status"].get("revision") == hash_ else ""


def _undo(kubectl: Kubectl, name: str, *, number: int | None) -> str:
    from mizzen.operator.crds.llmdeployment import NOT_IN_REVISION
    from mizzen.operator.planning.history import restored_spec

    resource = kubectl.get("llmdeployment", name)
    if job := (resource.get("status") or {}).get("promotedModel", {}).get("job"):
        # It stands in for spec.model.source, so nothing would come of another spec.
        raise KubectlError(
            f"{name} serves the model of job {job}. Delete that job, or take its approval away, "
            "to go back."
        )
    revisions = _revisions(kubectl, resource)
    if number is None:
        if len(revisions) < 2:
            raise KubectlError(f"{name} has no earlier revision to go back to.")
        number = list(revisions)[-2]
    if number not in revisions:
        there = ", ".join(map(str, revisions)) or "none"
        raise KubectlError(f"{name} has no revision {number}. There are: {there}.")
    past = revisions[number]["data"]["spec"]
    spec = restored_spec(resource["spec"], past, kept=NOT_IN_REVISION)
    # Somebody else's change in between is not to be lost. Of the spec only: the status of a
    # deployment that is worth undoing changes all the time.
    generation = resource["metadata"]["generation"]
    patch = [
        {"op": "test", "path": "/metadata/generation", "value": generation},
        {"op": "replace", "path": "/spec", "value": spec},
    ]
    kubectl("patch", "llmdeployment", name, "--type=json", "-p", json.dumps(patch))
    return f"{name} goes back to revision {number}."


def _revisions(kubectl: Kubectl, resource: Json) -> Mapping[int, Json]:
    """Return the ControllerRevisions by number, the oldest first."""
    metadata = resource["metadata"]
    selector = f"mizzen.dev/deployment={metadata['name']}"
    found = kubectl.get("controllerrevisions.apps", "-l", selector)["items"]
    own = [
        one
        for one in found
        if any(o["uid"] == metadata["uid"] for o in one["metadata"].get("ownerReferences") or [])
    ]
    return {int(one["revision"]): one for one in sorted(own, key=lambda one: one["revision"])}
