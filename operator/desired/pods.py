"""What every pod of ours has in common: hardening, scratch space, the user's allowed additions.

Pods built from these parts pass the `restricted` Pod Security level with a read-only root file
system. Must not know whether the pod serves or trains.
"""

from __future__ import annotations

from mizzen.operator.crds.common import Json, PodTemplatePatch
from mizzen.operator.desired.labels import ADMIN_SECRET, ADMIN_TOKEN_FOLDER

# Enough to be scheduled fairly; what a model really needs only its owner knows.
DEFAULT_REQUESTS = {"cpu": "100m", "memory": "256Mi"}
_USER_ID = 65532  # "nonroot" in the images we build
_SHARED_MEMORY = "2Gi"  # what ranks exchange at once, with room; never weights


def pod_security() -> Json:
    """Return the pod's security context."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER_ID,
        "runAsGroup": _USER_ID,
        "fsGroup": _USER_ID,
        # Changing the owner of every file of a large model at each start takes minutes.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Json:
    """Return the container's security context."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def scratch_volumes() -> list[Json]:
    """Return the only writable places: /tmp, and the shared memory that ranks talk through."""
    return [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
    ]


def scratch_mounts() -> list[Json]:
    """Return where the scratch volumes appear."""
    return [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]


def admin_token_volume() -> Json:
    """Return the volume with the token that admin calls must carry."""
    return {"name": "admin-token", "secret": {"secretName": ADMIN_SECRET}}


def admin_token_mount() -> Json:
    """Return where the token appears."""
    return {"name": "admin-token", "mountPath": ADMIN_TOKEN_FOLDER, "readOnly": True}


def with_patch(pod: Json, patch: PodTemplatePatch | None) -> Json:
    """Return the pod with the user's additions to its metadata, spec and first container.

    What we set ourselves stays: additions come behind ours in lists, and under ours in labels.
    """
    if patch is None:
        return pod
    extra = patch.to_api()
    metadata, spec = dict(pod["metadata"]), dict(pod["spec"])
    container = dict(spec["containers"][0])
    for key in ("labels", "annotations"):
        if key in extra:
            metadata[key] = extra[key] | metadata.get(key, {})
    for key in ("nodeSelector", "affinity", "runtimeClassName", "priorityClassName"):
        if key in extra:
            spec[key] = extra[key]
    for key in ("tolerations", "topologySpreadConstraints", "imagePullSecrets", "volumes"):
        if key in extra:
            spec[key] = [*spec.get(key, []), *extra[key]]
    for key in ("env", "volumeMounts"):
        if key in extra:
            container[key] = _by_name(container.get(key, []), extra[key], key)
    if "resources" in extra:
        container["resources"] = _merge_resources(
            container.get("resources", {}), extra["resources"]
        )
    spec["containers"] = [container, *spec["containers"][1:]]
    return pod | {"metadata": metadata, "spec": spec}


def _by_name(ours: list[Json], theirs: list[Json], key: str) -> list[Json]:
    """Return both lists as one; where both name the same variable or path, theirs is left out."""
    identity = "name" if key == "env" else "mountPath"
    taken = {entry[identity] for entry in ours}
    return [*ours, *(entry for entry in theirs if entry[identity] not in taken)]


def _merge_resources(ours: Json, theirs: Json) -> Json:
    """Return requests and limits with the user's amounts, but our count of devices."""
    limits = {**theirs.get("limits", {}), **ours.get("limits", {})}
    # Where only a limit is given it is the request too; a default of ours could be above it.
    defaults = {k: v for k, v in ours.get("requests", {}).items() if k not in limits}
    requests = {**defaults, **theirs.get("requests", {})}
    return {kind: v for kind, v in (("requests", requests), ("limits", limits)) if v}
