"""Building Kueue's controller and rendering its chart, once for each content of gomod/."""

import os
import shutil
import subprocess
from pathlib import Path

from hack.cluster import gobuild
from hack.cluster.errors import ClusterError
from hack.cluster.places import cache_root
from hack.cluster.progress import step

MODULE = Path(__file__).parent / "gomod"
PACKAGE = "sigs.k8s.io/kueue/cmd/kueue"
NAMESPACE = "kueue-system"


def folder() -> Path:
    """Return the folder of the binary `kueue` and its `chart.yaml`, there or not."""
    return cache_root() / "kueue" / gobuild.source_hash(MODULE)


def build() -> Path:
    """Build what is missing and return the folder.

    Raises:
        ClusterError: Go is missing, or a command failed; the text says which and why.
    """
    target = folder()
    if target.is_dir():
        return target
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        with step("Built Kueue"):
            _go("build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", partial, PACKAGE)
        (partial / "chart.yaml").write_text(_chart())
        # Last and at once: a folder under its final name is always complete.
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    # Gigabytes that only an interrupted build could use again.
    _go("clean", "-cache", "-modcache")
    return target


def _chart() -> str:
    module = _go("list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kueue").strip()
    helm = gobuild.build() / "helm"
    return _run(helm, "template", "kueue", Path(module, "charts", "kueue"), "-n", NAMESPACE)


def _go(*arguments: str | Path) -> str:
    return _run("go", *arguments)


def _run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    # A cache of its own: other builds that run meanwhile keep theirs.
    caches = {name: str(cache_root() / "kueue-go" / name) for name in ("GOCACHE", "GOMODCACHE")}
    try:
        done = subprocess.run(
            words,
            cwd=MODULE,
            env={**os.environ, **caches, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(f"{words[0]} is missing: install Go 1.26 or newer.") from error
    if done.returncode != 0:
        raise ClusterError(f"`{' '.join(words[:2])}` failed:\n{done.stderr.strip()}")
    return done.stdout
