"""Compiles the kernels, once per level of instructions, when the package is built or installed.

Needs the standard library and a C compiler alone: the build loads this file by its path. By hand:
`python -m mizzen.runtime.kernels.compile`.
"""

import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
_FLAGS = [
    *("-std=c11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
# Best first. Whoever loads a library asks the processor which it may load.
LEVELS = {
    "x86_64": {
        "amx": "-march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16 -mprefer-vector-width=512",
        "avx512bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
        "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
        "avx2": "-march=x86-64-v3",
        "plain": "",
    }
}
OTHERS = {"plain": ""}


class NoCompilerError(Exception):
    """There is no C compiler, or it does not compile these files."""


def library_path(level: str) -> Path:
    """Return where the library of a level lies."""
    return SOURCES / f"libmizzen-{level}.so"


def levels() -> dict[str, str]:
    """Return this machine's levels and their compiler flags, the best first."""
    return LEVELS.get(platform.machine(), OTHERS)


def compile_all() -> list[Path]:
    """Compile every level beside the sources; return the libraries.

    Raises:
        NoCompilerError: no level can be compiled. An old compiler may lack the best ones.
    """
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(_compile, levels().items()))
    made = [path for path, _ in results if path]
    if not made:
        raise NoCompilerError(results[-1][1])
    return made


def _compile(level: tuple[str, str]) -> tuple[Path | None, str]:
    name, flags = level
    path = library_path(name)
    fresh = path.with_suffix(f".{os.getpid()}")
    command = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS, *flags.split()]
    command += [*map(str, sorted(SOURCES.glob("*.c"))), "-o", str(fresh), "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return None, f"There is no C compiler {command[0]!r}: install one, or name yours in CC."
    except subprocess.CalledProcessError as error:
        return None, f"{shlex.join(command)} failed:\n{error.stderr}"
    # A process that has loaded the old one keeps it: never write into a file that is mapped.
    fresh.replace(path)
    return path, ""


if __name__ == "__main__":
    compile_all()
