"""Stand-ins for libraries that PyTorch loads for a GPU, on a machine without one.

Its build for GPUs loads all of them as it is imported, and some fill tables then: some 130 MB of
each process that no file backs, and as many of files' pages, for functions that nothing calls. It
looks for each in the entries of Python's path, in their order: the first that is found is loaded,
and is what the others are linked to.
"""

import mmap
from collections.abc import Iterable
from pathlib import Path

from mizzen.runtime.engine.hollow import hollow_out

# Without a device, the status 1 that their stand-ins return is a failure in all of them.
LIBRARIES = (
    *("cublas", "cublasLt", "cufft", "curand", "cusolver", "cusparse", "cusparseLt"),
    *("nvJitLink", "nvrtc"),
)
DEVICES = Path("/dev")
_GPU_NODES = ("nvidiactl", "dxg")  # in a machine and in a container, under Linux and WSL


def has_gpu(devices: Path = DEVICES) -> bool:
    """Whether this process may reach a GPU of NVIDIA's."""
    return any((devices / node).exists() for node in _GPU_NODES)


def write_stand_ins(folder: Path, search: Iterable[str]) -> None:
    """Put into `folder` what an entry of Python's path has for the libraries found in `search`.

    One that cannot be read is left out, and PyTorch loads the true one. So it would NVIDIA's Python
    package, without which it does as well: an empty one hides that.

    Raises:
        OSError: a file cannot be written.
    """
    sites = [Path(entry) for entry in search]
    for library in LIBRARIES:
        # Versions older than CUDA 13 have a folder for each library.
        places = (sorted(site.glob(f"nvidia/*/lib/lib{library}.so.*[0-9]")) for site in sites)
        for path in next(filter(None, places), []):
            _write_stand_in(path, folder.joinpath(*path.parts[-4:]))
    (folder / "cuda").mkdir(parents=True)
    (folder / "cuda/__init__.py").touch()


def _write_stand_in(path: Path, target: Path) -> None:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            hollow = hollow_out(content)
    except ValueError:  # from `mmap`, of an empty file, or a `NotALibraryError`
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(hollow)
