"""Watch the working tree and restart the pods of the part that changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hack.demo.console import DemoError
from hack.demo.kubectl import Kubectl
from hack.demo.target import local_environment
from hack.dev.mount import build_policy

_ROOT = Path(__file__).resolve().parents[2]
_SYSTEM = "mizzen-system"
_WATCHED = ("operator", "runtime", "mizzen/cli")


def newest_changes(seen: dict[Path, float]) -> list[Path]:
    """Return the Python files that changed since the last call; `seen` is brought up to date."""
    changed = []
    for folder in _WATCHED:
        for path in (_ROOT / folder).rglob("*.py"):
            modified = path.stat().st_mtime
            if seen.get(path) != modified:
                seen[path] = modified
                changed.append(path.relative_to(_ROOT))
    return changed


def part_of(path: Path) -> str:
    """Return which pods run a file: operator, gateway or runtime."""
    if path.parts[0] == "operator":
        return "operator"
    return "gateway" if path.parts[:2] == ("runtime", "gateway") else "runtime"


def restart(kubectl: Kubectl, part: str) -> None:
    """Replace the pods of one part; runtime pods are drained by their SIGTERM."""
    if part == "runtime":
        kubectl("delete", "pods", "-A", "-l", "mizzen.dev/role=runtime", "--wait=false")
        return
    kubectl("rollout", "restart", f"deployment/mizzen-{part}", "-n", _SYSTEM)


def relax_pod_security(kubectl: Kubectl) -> None:
    """Let our namespaces mount a host folder for as long as they run the working tree."""
    listed = kubectl("get", "pods", "-A", "-l", "app.kubernetes.io/part-of=mizzen", "-o", "name",
                     "--output=jsonpath={.items[*].metadata.namespace}")  # fmt: skip
    for namespace in sorted({_SYSTEM, *listed.split()}):
        kubectl("label", "namespace", namespace, "--overwrite",
                "pod-security.kubernetes.io/enforce=privileged")  # fmt: skip


def main() -> int:
    """Mount the tree, then restart what changes until interrupted."""
    if os.environ.get("CLUSTER", "local") != "local":
        print("make dev mounts this folder from the node's disk, so it needs the local cluster: "
              "run it with CLUSTER unset.")  # fmt: skip
        return 2
    kubectl = Kubectl(local_environment())
    kubectl("apply", "-f", "-", stdin=build_policy(_ROOT))
    relax_pod_security(kubectl)
    seen: dict[Path, float] = {}
    newest_changes(seen)
    for part in ("operator", "gateway", "runtime"):
        restart(kubectl, part)
    print("The working tree is mounted. Save a file and its pods restart; Ctrl-C ends the watch.")
    while True:
        time.sleep(0.5)
        if changed := newest_changes(seen):
            for part in sorted({part_of(path) for path in changed}):
                restart(kubectl, part)
                print(f"{', '.join(map(str, changed[:3]))}: {part} restarts", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\n`make deploy` goes back to the images.")
    except (DemoError, subprocess.CalledProcessError) as error:
        sys.exit(f"make dev: {error}")
