"""What an image is made from, as a tag: the same files give the same tag."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from hack.cluster.places import REPOSITORY

PROJECT = (
    *("Dockerfile", "LICENSE", "README.md", "hatch_build.py", "pyproject.toml"),
    *("mizzen", "operator", "runtime"),
)
LEFT_OUT = {".pyc", ".so"}  # made anew in the image
INSTALL = ("hack/images/install.sh", "requirements/build.lock", "requirements/uv.lock")
LOCKS = {
    "control": ("requirements/control.lock",),
    "runtime": ("requirements/runtime.lock", "requirements/torch.lock"),
}


def tag(target: str, *, base: str, slim_torch: bool, root: Path = REPOSITORY) -> str:
    """Return the tag of one of the Dockerfile's targets."""
    digest = hashlib.sha256(f"{target} {base} {slim_torch}".encode())
    for name in (*PROJECT, *INSTALL, *LOCKS[target]):
        for path in _files(root / name):
            digest.update(f"\0{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _files(path: Path) -> Iterator[Path]:
    """Yield what .dockerignore lets through, in a stable order."""
    if path.is_file():
        yield path
        return
    # rglob does not follow mizzen's links to operator and runtime, which are listed themselves.
    for found in sorted(path.rglob("*")):
        if found.is_file() and "__pycache__" not in found.parts and found.suffix not in LEFT_OUT:
            yield found
