"""Kubernetes Events with names that follow from their content, so that repeats count up. Pure."""

from dataclasses import dataclass

from mizzen.operator.kube.documents import Json, uid_of
from mizzen.operator.kube.intent import hash_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """News about a resource: `reason` for programs, `message` for people."""

    about: Json
    reason: str
    message: str
    is_warning: bool
    at: str  # RFC 3339


def first_event(event: Event) -> Json:
    """Return the Event object as it is first written."""
    metadata = event.about["metadata"]
    identity = {"uid": uid_of(event.about), "reason": event.reason, "message": event.message}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{metadata['name']}.{hash_of(identity)}",
            "namespace": metadata["namespace"],
        },
        "involvedObject": {
            "apiVersion": event.about["apiVersion"],
            "kind": event.about["kind"],
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": uid_of(event.about),
        },
        "reason": event.reason,
        "message": event.message[:1024],
        "type": "Warning" if event.is_warning else "Normal",
        "source": {"component": "mizzen-operator"},
        "reportingComponent": "mizzen-operator",
        "reportingInstance": "mizzen-operator",
        "firstTimestamp": event.at,
        "lastTimestamp": event.at,
        "count": 1,
    }


def repeat_event(live: Json, event: Event) -> Json:
    """Return the patch that counts the same news once more."""
    return {"count": int(live.get("count") or 1) + 1, "lastTimestamp": event.at}
