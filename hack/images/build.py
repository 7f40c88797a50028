"""Building both targets with buildah and pushing them to the local registry."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from hack.cluster import registry
from hack.cluster.errors import ClusterError
from hack.cluster.facts import free_bytes
from hack.cluster.host import attempt, run, succeeds
from hack.cluster.pins import load_pins
from hack.cluster.places import REPOSITORY, cluster_state_root
from hack.cluster.preflight import GIB, full_disk_sentence
from hack.cluster.progress import elapsed, say, step
from hack.images import base, content
from hack.images.store import alone, buildah

TARGETS = ("control", "runtime")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CERTIFICATES = Path("/etc/ssl/certs")
MB = 10**6


def tags(*, slim_torch: bool) -> dict[str, str]:
    """Return the tag of each image for the present sources."""
    made_from = base.name()
    return {one: content.tag(one, base=made_from, slim_torch=slim_torch) for one in TARGETS}


def build_packages(*, slim_torch: bool) -> None:
    """Build and push the layers below the project, which change with their pins only.

    Beside the build of the cluster's servers this costs little; after it, minutes.
    """
    with alone():
        _check_room()
        made_from = base.build()
        for target in TARGETS:
            stage = f"{target}-packages"
            local = f"localhost/mizzen/{stage}:latest"
            _build(stage, local, made_from=made_from, slim_torch=slim_torch)
            _push(target, local, f"{registry.address()}/mizzen/{stage}:latest")


def build_and_push(*, slim_torch: bool) -> dict[str, str]:
    """Build and push what the registry does not have; return the images' tags."""
    wanted = tags(slim_torch=slim_torch)
    with alone():
        _check_room()
        made_from = base.build()
        for target, tag in wanted.items():
            repository = f"mizzen/{target}"
            name = f"{registry.address()}/{repository}:{tag}"
            if compressed_bytes(repository, tag) is None:
                local = f"localhost/{repository}:{tag}"
                _build(target, local, made_from=made_from, slim_torch=slim_torch)
                _push(target, local, name)
                _forget_older(repository, keep=local)
            say(f"{name} ({(compressed_bytes(repository, tag) or 0) / MB:.0f} MB compressed)")
    return wanted


def compressed_bytes(repository: str, tag: str) -> int | None:
    """Return the size of an image's layers in the registry; None when it is not there."""
    url = f"http://{registry.address()}/v2/{repository}/manifests/{tag}"
    request = urllib.request.Request(url, headers={"Accept": MANIFEST})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as answer:
            layers: list[dict[str, int]] = json.load(answer)["layers"]
            return sum(layer["size"] for layer in layers)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise ClusterError(f"The local registry answered {error.code} for {url}.") from error


def build_command(target: str, image: str, *, made_from: str, slim_torch: bool) -> list[str]:
    """Return the buildah command for one target."""
    command = buildah("bud", "--layers", "--target", target, "--tag", image)
    # Needs no rights beyond root's own; with the host's network, its certificates are needed too.
    command += ["--isolation", "chroot", "--network", "host"]
    if CERTIFICATES.is_dir():
        command += ["--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
    # Wheels that the development environment has fetched are not fetched again.
    command += ["--volume", f"{uv_cache()}:/var/cache/uv"]
    command += ["--build-arg", f"BASE_IMAGE={made_from}"]
    if slim_torch:
        command += ["--build-arg", "SLIM_TORCH=1"]
    return [*command, str(REPOSITORY)]


def uv_cache() -> Path:
    """Return where uv keeps its wheels on this machine."""
    if folder := os.environ.get("UV_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv"


def _check_room() -> None:
    if succeeds(*buildah("inspect", "--type", "image", base.name())):
        return  # Built before: the large layers are there.
    root, needed_gib = cluster_state_root(), load_pins().images_gib
    free = free_bytes(root)
    if free < needed_gib * GIB:
        raise ClusterError(full_disk_sentence(str(root), free, needed_gib, who="the images need"))


def _build(target: str, image: str, *, made_from: str, slim_torch: bool) -> None:
    uv_cache().mkdir(parents=True, exist_ok=True)
    command = build_command(target, image, made_from=made_from, slim_torch=slim_torch)
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines: list[str] = []
    assert process.stdout is not None  # stdout=PIPE above
    for line in process.stdout:
        lines.append(line.rstrip())
        if "STEP" in line and ("RUN " in line or "COPY " in line):
            say(f"  {elapsed(time.monotonic() - started):>12}  {line.strip()[:80]}")
    if process.wait() != 0:
        words = "\n".join(lines[-15:])
        raise ClusterError(f"Building the image {target} failed:\n{words}")
    say(f"Built the image {target} ({elapsed(time.monotonic() - started)})")


def _forget_older(repository: str, *, keep: str) -> None:
    """Remove earlier builds of an image here; the layers that the latest one shares stay."""
    listing = run(*buildah("images", "--format", "{{.Name}}:{{.Tag}}"))
    for image in listing.split():
        if image.startswith(f"localhost/{repository}:") and image != keep:
            attempt(buildah("rmi", image))


def _push(target: str, image: str, name: str) -> None:
    with step(f"Pushed {name}"):
        options = ["--quiet", "--tls-verify=false"]
        if target == "runtime":
            # Gigabytes that stay on this disk: the processor is the slow part, so the lightest.
            options += ["--compression-format=gzip", "--compression-level=1"]
        run(*buildah("push", *options, image, f"docker://{name}"))
