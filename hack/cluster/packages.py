"""Debian packages: installed only when missing."""

import os
import subprocess
from pathlib import Path

from hack.cluster.errors import ClusterError
from hack.cluster.facts import missing_packages
from hack.cluster.host import attempt
from hack.cluster.progress import say, step

# Debian starts these at once; the cluster runs its own, and the registry's port would be taken.
OWN_SERVICES = ("docker-registry", "containerd")


def install(wanted: tuple[str, ...]) -> None:
    """Install what is missing."""
    missing = missing_packages(wanted)
    if not missing:
        return
    say(f"Installing with apt-get: {' '.join(missing)}")
    with step("Installed the missing packages"):
        # An old list names versions that are gone; refreshing it costs seconds.
        _apt_get("update", "-q")
        _apt_get("install", "-q", "-y", "--no-install-recommends", *missing)
    for service in OWN_SERVICES:
        if service in missing and Path("/run/systemd/system").is_dir():
            attempt(["systemctl", "disable", "--now", service])


def _apt_get(*arguments: str) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        ["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-5:]
        raise ClusterError(f"`apt-get {' '.join(arguments)}` failed: " + "\n".join(words))
