"""What a pod needs to fetch its model: somewhere to keep it, and what opens the source. Pure.

The cache is a volume of ours, never a path of the node: the `restricted` Pod Security level refuses
hostPath. What is to outlive pods on a node is a claim of a local volume.
"""

from __future__ import annotations

from math import ceil

from mizzen.operator.crds.common import Json
from mizzen.operator.crds.served_model import Model, ModelCache
from mizzen.operator.desired.sources import locate_model

CACHE_FOLDER = "/var/cache/mizzen"
_VOLUME = "model-cache"
# Beside the models lie their manifests and locks; the kubelet evicts a pod for a byte too many.
_BESIDE_MIB = 64
# Required keys first; a Secret without one keeps the container from starting, by name.
_HUB_KEYS = {"HF_TOKEN": False}
_BUCKET_KEYS = {
    "AWS_ACCESS_KEY_ID": False,
    "AWS_SECRET_ACCESS_KEY": False,
    "AWS_SESSION_TOKEN": True,
}


def cache_volumes(model: Model) -> list[Json]:
    """Return the volume for a fetched model, none for one that lies on a volume already."""
    if not locate_model(model.source).is_remote:
        return []
    cache = model.cache or ModelCache()
    if cache.claim is not None:
        return [{"name": _VOLUME, "persistentVolumeClaim": {"claimName": cache.claim}}]
    if cache.max_gib is None:
        return [{"name": _VOLUME, "emptyDir": {}}]
    limit = f"{ceil(cache.max_gib * 1024) + _BESIDE_MIB}Mi"
    return [{"name": _VOLUME, "emptyDir": {"sizeLimit": limit}}]


def cache_mounts(model: Model) -> list[Json]:
    """Return where the volume appears."""
    return [{"name": volume["name"], "mountPath": CACHE_FOLDER} for volume in cache_volumes(model)]


def cache_flags(model: Model) -> dict[str, object | None]:
    """Return what the runtime has to know of its cache."""
    if not locate_model(model.source).is_remote:
        return {}
    return {
        "--cache-dir": CACHE_FOLDER,
        "--cache-gib": model.cache.max_gib if model.cache else None,
    }


def credentials_env(model: Model) -> list[Json]:
    """Return the variables from the Secret, by the names that all clients of such sources know."""
    if model.credentials is None:
        return []
    keys = _HUB_KEYS if locate_model(model.source).is_in_hub else _BUCKET_KEYS
    return [
        {"name": key, "valueFrom": {"secretKeyRef": _key(model.credentials.name, key, optional)}}
        for key, optional in keys.items()
    ]


def _key(secret: str, key: str, optional: bool) -> Json:
    reference: Json = {"name": secret, "key": key}
    return reference | ({"optional": True} if optional else {})
