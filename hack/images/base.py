"""The base image, made from Debian packages where no public registry can be reached."""

import hashlib
import json
import tempfile
from pathlib import Path

from hack.cluster.host import run, succeeds
from hack.cluster.pins import load_pins
from hack.cluster.progress import step
from hack.images.store import buildah

PACKAGES = ("ca-certificates", "python3", "python3-venv", "usr-is-merged")
# Nobody reads these in a container. Copyright files stay, as their licences ask.
LEFT_OUT = (
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/doc/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",  # Python brings its own character sets
)
TRIM = 'rm -rf "$1"/var/cache/debconf/*-old "$1"/usr/lib/python3*/lib2to3'
# With merged folders from the start, no Perl is needed to merge them.
HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"
DOCKERFILE = """\
FROM scratch
ADD base.tar /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
CMD ["python3"]
"""


def debootstrap_command(target: Path) -> list[str]:
    """Return the command that writes the file system of a small Debian as a tar file."""
    return [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        f"--hook-dir={HOOKS}",
        *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        f"--customize-hook={TRIM}",
        load_pins().debian_suite,
        str(target),
    ]


def name() -> str:
    """Return the image's name, which changes with its recipe."""
    recipe = json.dumps([debootstrap_command(Path("base.tar")), DOCKERFILE])
    return f"localhost/mizzen-base:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def build() -> str:
    """Make the base image unless it is there, and return its name."""
    image = name()
    if succeeds(*buildah("inspect", "--type", "image", image)):
        return image
    with step("Made the base image"), tempfile.TemporaryDirectory() as folder:
        run(*debootstrap_command(Path(folder) / "base.tar"))
        (Path(folder) / "Dockerfile").write_text(DOCKERFILE)
        run(*buildah("bud", "--quiet", "--isolation", "chroot", "--tag", image, folder))
    return image
