"""Says what a cluster's pods wait for, when a wait was in vain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hack.demo.console import DemoError
from hack.demo.kubectl import Kubectl

_NO_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")


@contextmanager
def explained(kubectl: Kubectl, namespace: str) -> Iterator[None]:
    """Add to a failed step what the pods of this namespace wait for.

    Raises:
        DemoError: the step's own, with what to do about it.
    """
    try:
        yield
    except DemoError as error:
        pods = (kubectl.get("pods", "-n", namespace) or {}).get("items", [])
        claims = (kubectl.get("pvc", "-n", namespace) or {}).get("items", [])
        if not (reasons := what_is_missing(pods, claims)):
            raise
        raise DemoError("\n".join([*reasons, "", str(error)])) from error


def what_is_missing(pods: Any, claims: Any) -> list[str]:
    """Return what the user can provide so that these pods start: images, volumes."""
    images = {
        str(container["image"])
        for pod in pods
        for container in pod.get("status", {}).get("containerStatuses", [])
        if container.get("state", {}).get("waiting", {}).get("reason") in _NO_IMAGE
    }
    found = [
        f"The cluster cannot pull {image}. Build it, load or push it as docs/quickstart.md says, "
        "and name the place in MIZZEN_IMAGES and MIZZEN_TAG."
        for image in sorted(images)
    ]
    found += [
        f"The claim {claim['metadata']['name']} is not bound. The cluster needs a default "
        "StorageClass, or a PersistentVolume that fits it: kubectl describe pvc "
        f"{claim['metadata']['name']} -n {claim['metadata']['namespace']}"
        for claim in claims
        if claim.get("status", {}).get("phase") == "Pending"
    ]
    return found
