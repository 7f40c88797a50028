"""Watch the working tree and restart the pods of the part that changed."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from hack.demo.console import DemoError
from hack.demo.kubectl import Kubectl
from hack.demo.target import local_environment
from hack.dev.session import PARTS, begin, relax_pod_security, restart, undo

_ROOT = Path(__file__).resolve().parents[2]
_WATCHED = ("operator", "runtime", "mizzen/cli")
_LOOK_S = 0.5
_LOOKS_BETWEEN_NAMESPACES = 20


def newest_changes(seen: dict[Path, float]) -> list[Path]:
    """Return the Python files that changed since the last call; `seen` is brought up to date."""
    changed = []
    for folder in _WATCHED:
        for path in (_ROOT / folder).rglob("*.py"):
            try:
                modified = path.stat().st_mtime
            except FileNotFoundError:
                continue  # an editor replaces a file by moving another one there
            if seen.get(path) != modified:
                seen[path] = modified
                changed.append(path.relative_to(_ROOT))
    return changed


def parts_of(path: Path) -> tuple[str, ...]:
    """Return whose pods run a file; a trainer runs to its end, so the next one has it."""
    match path.parts[:2]:
        case ("operator", _):
            return ("operator",)
        case ("runtime", "gateway"):
            return ("gateway",)
        case ("runtime", "train"):
            return ()
        case ("runtime", _):
            return ("runtime",)
    return PARTS


def watch(kubectl: Kubectl) -> None:
    """Restart what changes until interrupted."""
    seen: dict[Path, float] = {}
    newest_changes(seen)
    looks = 0
    while True:
        time.sleep(_LOOK_S)
        if changed := newest_changes(seen):
            parts = sorted({part for path in changed for part in parts_of(path)})
            for part in parts:
                restart(kubectl, part)
            shown = ", ".join(map(str, changed[:3]))
            print(f"{shown}: {', '.join(parts) or 'nothing'} restarts", flush=True)
        looks += 1
        if looks % _LOOKS_BETWEEN_NAMESPACES == 0:
            # A namespace that is used since now.
            relax_pod_security(kubectl)


def main() -> int:
    """Mount the tree, watch it, and leave the cluster as it was."""
    parser = argparse.ArgumentParser(prog="make dev", description=__doc__)
    parser.add_argument("--undo", action="store_true", help="only undo what a lost run has left")
    arguments = parser.parse_args()
    if os.environ.get("CLUSTER", "local") != "local":
        print("make dev mounts this folder from the node's disk, so it needs the local cluster: "
              "run it with CLUSTER unset.")  # fmt: skip
        return 2
    kubectl = Kubectl(local_environment())
    if arguments.undo:
        print("Back to the images." if undo(kubectl) else "There was nothing to undo.")
        return 0
    # Set by hand: a shell starts its background jobs with Ctrl-C ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        begin(kubectl, _ROOT)
        print("The working tree is mounted. Save a file and its pods restart; "
              "Ctrl-C goes back to the images.", flush=True)  # fmt: skip
        watch(kubectl)
    except KeyboardInterrupt:
        pass
    finally:
        print("\nBack to the images.", flush=True)
        undo(kubectl)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (DemoError, subprocess.CalledProcessError) as error:
        sys.exit(f"make dev: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted half-way; go on with: .venv/bin/python -m hack.dev --undo")
