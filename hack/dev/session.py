"""What `make dev` changes in the cluster, and how it is undone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

from hack.demo.console import DemoError
from hack.demo.kubectl import Kubectl
from hack.dev.mount import POLICY, PROBE, VOLUME, build_policy

PARTS = ("operator", "gateway", "runtime")
_SYSTEM = "mizzen-system"
_ENFORCE = "pod-security.kubernetes.io/enforce"
_BEFORE = "mizzen.dev/pod-security-before-dev"
_KINDS = "mutatingadmissionpolicybindings,mutatingadmissionpolicies"


def begin(kubectl: Kubectl, source: Path) -> None:
    """Mount the working tree into all pods of ours, from their next start on."""
    kubectl("apply", "-f", "-", stdin=build_policy(source))
    relax_pod_security(kubectl)
    _wait_until_mounted(kubectl, True)
    for part in PARTS:
        restart(kubectl, part)


def undo(kubectl: Kubectl) -> bool:
    """Go back to the images and to the Pod Security levels of before; False if nothing was done."""
    was_mounted = POLICY in kubectl("get", _KINDS, "-o", "name")
    kubectl("delete", _KINDS, POLICY, "--ignore-not-found")
    _wait_until_mounted(kubectl, False)
    for namespace, metadata in _namespaces(kubectl):
        if before := metadata.get("annotations", {}).get(_BEFORE):
            _label(kubectl, namespace, before)
            kubectl("annotate", "namespace", namespace, f"{_BEFORE}-")
    if was_mounted:
        for part in PARTS:
            restart(kubectl, part)
    return was_mounted


def restart(kubectl: Kubectl, part: str) -> None:
    """Replace the pods of one part; runtime pods are drained by their SIGTERM."""
    if part == "runtime":
        kubectl("delete", "pods", "-A", "-l", "mizzen.dev/role=runtime", "--wait=false")
        return
    kubectl("rollout", "restart", f"deployment/mizzen-{part}", "-n", _SYSTEM)


def relax_pod_security(kubectl: Kubectl) -> None:
    """Let namespaces with pods of ours mount a host folder for as long as they run the tree."""
    # Not by their pods: those are refused where the level is still strict.
    listed = kubectl("get", "llmdeployments,finetunejobs", "-A",
                     "-o", "jsonpath={.items[*].metadata.namespace}")  # fmt: skip
    ours = {_SYSTEM, *listed.split()}
    for namespace, metadata in _namespaces(kubectl):
        level = metadata.get("labels", {}).get(_ENFORCE, "privileged")
        if namespace in ours and level != "privileged":
            kubectl("annotate", "namespace", namespace, "--overwrite", f"{_BEFORE}={level}")
            _label(kubectl, namespace, "privileged")


def _label(kubectl: Kubectl, namespace: str, level: str) -> None:
    kubectl("label", "namespace", namespace, "--overwrite", f"{_ENFORCE}={level}")


def _namespaces(kubectl: Kubectl) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    for namespace in json.loads(kubectl("get", "namespaces", "-o", "json"))["items"]:
        yield namespace["metadata"]["name"], namespace["metadata"]


def _wait_until_mounted(kubectl: Kubectl, wanted: bool) -> None:
    """Wait until the API server has taken notice: a pod made before would be the wrong one."""
    for _ in range(60):
        made = kubectl("create", "--dry-run=server", "-n", _SYSTEM, "-f", "-", "-o", "json",
                       stdin=PROBE)  # fmt: skip
        if (VOLUME in made) == wanted:
            return
        time.sleep(0.5)
    raise DemoError(f"The API server did not take notice of the policy {POLICY} within 30 s.")
