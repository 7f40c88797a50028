"""A deployment's past revisions as ControllerRevisions, and pods' own notes of what they are from.

Each holds the part of the spec that its revision was hashed from, and the runtime's image: enough
to make the revision's pods again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.llmdeployment import NOT_IN_REVISION, LLMDeploymentSpec
from mizzen.operator.desired import labels
from mizzen.operator.desired.serving import Serving
from mizzen.operator.desired.sources import locate_model

KIND = "ControllerRevision"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A revision that can be made again."""

    revision: str
    made_from: Json  # spec and image
    number: int = 0  # 0: not written yet


def build_revision(serving: Serving, recorded: Recorded) -> Json:
    """Return the ControllerRevision that keeps a revision."""
    return {
        "apiVersion": "apps/v1",
        "kind": KIND,
        "metadata": {
            "name": f"{serving.name}-{recorded.revision}",
            "namespace": serving.namespace,
            "labels": {
                **labels.deployment_labels(serving.name),
                labels.REVISION: recorded.revision,
            },
            "ownerReferences": [serving.owner],
        },
        "data": recorded.made_from,
        "revision": recorded.number,
    }


def read_revision(document: Json) -> Recorded | None:
    """Return what a ControllerRevision keeps, None where it is none of ours."""
    revision = (document["metadata"].get("labels") or {}).get(labels.REVISION)
    data = document.get("data") or {}
    if not revision or not _is_whole(data):
        return None
    return Recorded(revision, data, int(document.get("revision") or 0))


def read_note(pod: Json) -> Recorded | None:
    """Return what a pod says it was made from, None where it says nothing that can be read."""
    metadata = pod["metadata"]
    try:
        data = json.loads((metadata.get("annotations") or {}).get(labels.MADE_FROM, ""))
    except ValueError:
        return None
    return Recorded(metadata["labels"][labels.REVISION], data) if _is_whole(data) else None


def serving_at(serving: Serving, recorded: Recorded) -> Serving:
    """Return the deployment as it was at a past revision, with today's size and adapters.

    Raises:
        ValueError: what was recorded is no spec to this version.
    """
    today = serving.spec
    spec = LLMDeploymentSpec.parse(recorded.made_from["spec"]).model_copy(
        update={field: getattr(today, field) for field in NOT_IN_REVISION}
    )
    return replace(serving, spec=spec, image=recorded.made_from["image"])


def can_swap(before: Json, after: Json) -> bool:
    """Whether other weights turn the one into the other; both are what revisions were made from.

    They may differ in their folder on one claim.
    """
    if _without_source(before) != _without_source(after):
        return False
    old, new = (locate_model(one["spec"]["model"]["source"]) for one in (before, after))
    return new.claim is not None and new.claim == old.claim


def weights_path(spec: LLMDeploymentSpec) -> str:
    """Return where a runtime finds the weights on their claim, empty where they are on none."""
    found = locate_model(spec.model.source)
    return found.path if found.claim is not None else ""


def _without_source(made_from: Json) -> Json:
    spec = made_from["spec"]
    model = {key: value for key, value in spec["model"].items() if key != "source"}
    return made_from | {"spec": spec | {"model": model}}


def _is_whole(data: object) -> bool:
    return (
        isinstance(data, dict)
        and isinstance(data.get("spec"), dict)
        and isinstance(data.get("image"), str)
    )
