"""Keeps of an object what decisions need: thousands of them live in memory. Pure."""

import sys
from typing import Any

from mizzen.operator.kube.documents import Json

_POD_SPEC = ("nodeName", "schedulingGates", "terminationGracePeriodSeconds")
_POD_STATUS = (
    "phase",
    "conditions",
    "containerStatuses",
    "initContainerStatuses",
    "podIP",
    "reason",
    "message",
    "startTime",
)
# Their status is other controllers' business, and changes often.
_WITHOUT_STATUS = (
    *("PodDisruptionBudget", "Service", "NetworkPolicy"),
    *("InferencePool", "HTTPRoute"),
)
_METADATA_DROPPED = ("managedFields", "selfLink", "generateName")
# kubectl's copy of the whole object.
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def trim(document: Json) -> Json:
    """Return the part worth keeping, with keys and short strings shared between objects."""
    kept = {**document, "metadata": _metadata(document["metadata"])}
    if document.get("kind") == "Pod":
        kept["spec"] = _only(document.get("spec") or {}, _POD_SPEC)
        kept["status"] = _only(document.get("status") or {}, _POD_STATUS)
    elif document.get("kind") in _WITHOUT_STATUS:
        kept.pop("status", None)
    shared: Json = _share(kept)
    return shared


def _metadata(metadata: Json) -> Json:
    kept = {key: value for key, value in metadata.items() if key not in _METADATA_DROPPED}
    if _LAST_APPLIED in (kept.get("annotations") or {}):
        kept["annotations"] = {
            key: value for key, value in kept["annotations"].items() if key != _LAST_APPLIED
        }
    return kept


def _only(document: Json, fields: tuple[str, ...]) -> Json:
    return {field: document[field] for field in fields if field in document}


def _share(value: Any) -> Any:
    """Return an equal value whose repeated strings are one object in memory."""
    if isinstance(value, dict):
        return {sys.intern(key): _share(element) for key, element in value.items()}
    if isinstance(value, list):
        return [_share(element) for element in value]
    if isinstance(value, str) and len(value) <= 64:
        return sys.intern(value)
    return value
