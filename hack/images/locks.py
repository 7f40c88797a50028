"""Cut the images' lock files out of requirements.lock: python -m hack.images.locks (needs uv).

The subsets can only hold what the full lock pins, so images and development never differ.
"""

import re
import subprocess
from pathlib import Path

from hack.cluster.places import REPOSITORY

FULL = REPOSITORY / "requirements.lock"
FOLDER = REPOSITORY / "requirements"
PYPROJECT = str(REPOSITORY / "pyproject.toml")
PIN = re.compile(r"^([a-z0-9][\w.-]*)==(\S+)", re.MULTILINE)


def pins(lock: Path) -> dict[str, str]:
    """Return the versions that a lock file pins."""
    return dict(PIN.findall(lock.read_text()))


def compile_lock(
    name: str, *sources: str, stdin: str = "", leave_out: set[str] | None = None
) -> None:
    """Write one subset with its hashes."""
    options = [f"--no-emit-package={package}" for package in sorted(leave_out or ())]
    command = ["uv", "pip", "compile", *sources, *options, f"--constraints={FULL}"]
    command += ["--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header"]
    command += ["--python-version=3.11", "--quiet", f"--output-file={FOLDER / name}"]
    subprocess.run(command, input=stdin, text=True, check=True)


def main() -> None:
    """Write all of them."""
    compile_lock("control.lock", PYPROJECT, "--extra=tracing")
    compile_lock("torch.lock", "-", stdin="torch")
    # PyTorch's closure is a layer of its own, which only its own pin changes.
    torch = set(pins(FOLDER / "torch.lock"))
    names = ("runtime", "rlhf", "data", "tracing", "transformers")
    extras = [f"--extra={name}" for name in names]
    compile_lock("runtime.lock", PYPROJECT, *extras, leave_out=torch)
    compile_lock("build.lock", "-", stdin="hatchling\nuv")
    compile_lock("uv.lock", "-", stdin="uv")


if __name__ == "__main__":
    main()
