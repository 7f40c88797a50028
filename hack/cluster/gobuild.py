"""Building the cluster's servers from gomod/, once for each content of its files."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hack.cluster.errors import ClusterError
from hack.cluster.pins import MODULE, module_version
from hack.cluster.places import cache_root
from hack.cluster.progress import elapsed, say

# Names under which the one binary `all` is started; it looks at the name as busybox does.
NAMES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
    "etcd",
    "coredns",
)
PACKAGES = ("./all", "./pause", "helm.sh/helm/v4/cmd/helm", "sigs.k8s.io/kwok/cmd/kwok")
# kwok's own stages that we use as they are; pod_stages.yaml has ours for pods.
KWOK_STAGES = ("node/fast", "node/heartbeat-with-lease")
REPORT_EVERY_S = 15.0


def source_hash(module: Path = MODULE) -> str:
    """Return a short hash of everything that the binaries are made from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in module.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(module)}\0".encode())
        digest.update(path.read_bytes())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def binaries() -> Path:
    """Return the folder of the built binaries, there or not."""
    return cache_root() / "bin" / source_hash()


def is_built() -> bool:
    """Say whether the binaries for the present sources are there."""
    return binaries().is_dir()


def linker_flags(go_mod: str) -> str:
    """Return the -ldflags that stamp versions; unstamped servers call themselves v0.0.0.

    Charts with a kubeVersion would refuse such a cluster. Commit and date are fixed, so that the
    same sources give the same binaries.
    """
    kubernetes = module_version("k8s.io/kubernetes", go_mod)
    major, minor, _ = kubernetes.removeprefix("v").split(".", 2)
    stamp = {
        "gitVersion": kubernetes,
        "gitMajor": major,
        "gitMinor": minor,
        "gitTreeState": "clean",
        "gitCommit": "0" * 40,
        "buildDate": "2026-01-01T00:00:00Z",
    }
    values = {
        f"{package}.{name}": value
        for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
        for name, value in stamp.items()
    }
    helm = module_version("helm.sh/helm/v4", go_mod)
    values["helm.sh/helm/v4/internal/version.version"] = helm
    values["sigs.k8s.io/kwok/pkg/consts.Version"] = module_version("sigs.k8s.io/kwok", go_mod)
    return " ".join(["-s -w", *(f"-X {name}={value}" for name, value in values.items())])


def build() -> Path:
    """Build what is missing and return the folder of the binaries."""
    target = binaries()
    if target.is_dir():
        return target
    if shutil.which("go") is None:
        raise ClusterError(
            "Go is missing: install Go 1.26 or newer and put `go` on the PATH, "
            "it builds the cluster's servers."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_build_at_a_time(target.parent):
        if not target.is_dir():
            _build_into(target)
    return target


@contextmanager
def _one_build_at_a_time(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(target: Path) -> None:
    # We hold the lock, so any other partial folder belongs to a build that was interrupted.
    for stale in target.parent.glob("*.partial"):
        shutil.rmtree(stale)
    partial = target.with_name(target.name + ".partial")
    partial.mkdir()
    _compile(partial)
    for name in NAMES:
        (partial / name).symlink_to("all")
    (partial / "node-stages.yaml").write_text(_node_stages())
    # Last and at once: a folder under its final name is always complete.
    partial.rename(target)
    # 8 GiB that only an interrupted build could use again.
    _go("clean", "-cache", "-modcache")


def _compile(folder: Path) -> None:
    started = time.monotonic()
    flags = ["-trimpath", "-buildvcs=false"]
    say("Fetching the Go modules; the first time they are 0.8 GB.")
    total = len(_go("list", *flags, "-deps", *PACKAGES).split())
    say(
        f"Building Kubernetes, etcd, Helm and kwok: {total} packages, the first time takes minutes."
    )
    stamp = linker_flags(_go_mod())
    process = subprocess.Popen(
        ["go", "build", "-v", *flags, "-ldflags", stamp, "-o", f"{folder}/", *PACKAGES],
        cwd=MODULE,
        env=_go_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    compiled: list[str] = []
    other: list[str] = []
    ended = threading.Event()
    reporter = threading.Thread(target=_report, args=(compiled, total, started, ended), daemon=True)
    reporter.start()
    assert process.stderr is not None  # stderr=PIPE above
    for line in process.stderr:
        # -v prints the import path of what it compiles; the rest is downloads and errors.
        (other if " " in line or line.startswith("#") else compiled).append(line.rstrip())
    ended.set()
    if process.wait() != 0:
        raise ClusterError("Building the cluster's servers failed:\n" + "\n".join(other[-20:]))
    say(f"Built the cluster's servers ({elapsed(time.monotonic() - started)})")


def _report(compiled: list[str], total: int, started: float, ended: threading.Event) -> None:
    while not ended.wait(REPORT_EVERY_S):
        passed = elapsed(time.monotonic() - started)
        say(f"  compiled {len(compiled)} of at most {total} packages, {passed}")


def _node_stages() -> str:
    module = Path(_go("list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kwok").strip())
    files: list[Path] = []
    for name in KWOK_STAGES:
        folder = module / "kustomize" / "stage" / name
        files += sorted(path for path in folder.glob("*.yaml") if path.stem != "kustomization")
    return "\n---\n".join(path.read_text().strip() for path in files) + "\n"


def _go(*arguments: str) -> str:
    done = subprocess.run(
        ["go", *arguments],
        cwd=MODULE,
        env=_go_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ClusterError(f"`go {arguments[0]}` failed:\n{done.stderr.strip()}")
    return done.stdout


def _go_environment() -> dict[str, str]:
    # Caches of our own, so that they can be deleted.
    caches = {"GOCACHE": cache_root() / "go" / "build", "GOMODCACHE": cache_root() / "go" / "mod"}
    return {**os.environ, **{name: str(path) for name, path in caches.items()}, "CGO_ENABLED": "0"}


def _go_mod() -> str:
    return (MODULE / "go.mod").read_text()
