"""Where the demo runs: the local cluster with its registry, or the caller's own context."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from hack.demo.console import Background, Console, run, wait_for_all
from hack.demo.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]
VENV_PYTHON = ROOT / ".venv" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Images:
    """Where the cluster pulls from; tags change with their content."""

    control_repository: str
    control_tag: str
    runtime_repository: str
    runtime_tag: str

    def values(self) -> list[str]:
        """Return the flags that tell the chart."""
        return [
            "--set", f"image.control.repository={self.control_repository}",
            "--set-string", f"image.control.tag={self.control_tag}",
            "--set", f"image.runtime.repository={self.runtime_repository}",
            "--set-string", f"image.runtime.tag={self.runtime_tag}",
        ]  # fmt: skip


def cluster(*arguments: str) -> list[str]:
    """Return a command of the local cluster's tool."""
    return [sys.executable, "-m", "hack.cluster", *arguments]


def local_environment() -> dict[str, str]:
    """Return the environment in which kubectl and helm reach the local cluster."""
    environment = dict(os.environ)
    for line in run(cluster("env"), cwd=ROOT).splitlines():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            environment[name] = os.path.expandvars("".join(shlex.split(value)))
    return environment


def prepare_downloads(console: Console, *, is_local: bool) -> None:
    """Make side by side what can be: the Go build is bound by the processor, the Python environment
    and the base image by the network and the disk.
    """
    tasks = [Background("Python environment", ["make", "--no-print-directory", "venv"])]
    if is_local:
        tasks.append(Background("Kubernetes binaries", cluster("build")))
        tasks.append(Background("base image", cluster("base")))
    wait_for_all(console, tasks)


def build_local_images(console: Console) -> Images:
    """Build both images and push them to the local registry."""
    task = Background("images", cluster("images"))
    wait_for_all(console, [task])
    registry = local_environment()["MIZZEN_REGISTRY"]
    tags = dict(line.split("=", 1) for line in run(cluster("images", "--tags")).split())
    return Images(
        f"{registry}/mizzen/control", tags["control"], f"{registry}/mizzen/runtime", tags["runtime"]
    )


def images_from_environment() -> Images:
    """Return the images that the user has pushed or loaded for a cluster of one's own."""
    repository = os.environ.get("MIZZEN_IMAGES", "mizzen")
    tag = os.environ.get("MIZZEN_TAG", "dev")
    return Images(f"{repository}/control", tag, f"{repository}/runtime", tag)


def kubectl_of(target: str) -> Kubectl:
    """Return kubectl for `local` or `current`."""
    if target == "current":
        return Kubectl.of_current_context()
    return Kubectl(local_environment())
