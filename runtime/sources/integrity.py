"""Are these the bytes that were fetched: a manifest of hashes, checked as often as it is worth.

Sizes and times of change are compared at every start. The hashes are computed at the first start
on a node since its boot and whenever a time differs: a disk that rots or a copy that was damaged on
its way to another node is found, and a restart does not pay for it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from mizzen.runtime.sources.remote import RemoteFile

MANIFEST = "manifest.json"
_CHECKED = "checked"  # in it the boots of nodes on which the hashes were found right
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BLOCK_BYTES = 4 * 2**20
_THREADS = 4

Count = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file as it was when it was fetched."""

    name: str
    size: int
    mtime_ns: int
    sha256: str


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether the file has the content that its keeper announced, as far as that was said."""
    if path.stat().st_size != file.size:
        return False
    kind, _, wanted = file.digest.partition(":")
    if kind == "sha256":
        return sha256_of(path) == wanted
    if kind == "git":
        # Small files: a hub knows these only by the name that git gives their content.
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == wanted
    return True


def sha256_of(path: Path, count: Count = lambda _: None) -> str:
    """Return the hash of a file in hexadecimal, telling `count` of each block."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, files: Iterable[RemoteFile], count: Count) -> None:
    """Record what the files are now, all of them matching; with a manifest a folder is complete."""
    with ThreadPoolExecutor(_THREADS) as pool:
        kept = list(pool.map(lambda file: _kept(folder / file.name, file, count), files))
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"files": [asdict(file) for file in kept]}, indent=1))
    _mark_checked(folder)
    unfinished.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> list[KeptFile] | None:
    """Return what the folder should hold, None where it was never completed."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        return [KeptFile(**file) for file in document["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def damaged_files(folder: Path, kept: Iterable[KeptFile], count: Count) -> list[str]:
    """Return the names of files that are not what they were, in a fixed order."""
    kept = list(kept)
    changed = [file for file in kept if _state(folder / file.name) != (file.size, file.mtime_ns)]
    suspects = changed if _is_checked(folder) else kept
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda file: _is_whole(folder / file.name, file, count), suspects)
        damaged = [file.name for file, whole in zip(suspects, results, strict=True) if not whole]
    if not damaged:
        _mark_checked(folder)
    return damaged


def needs_hashing(folder: Path, kept: Iterable[KeptFile]) -> bool:
    """Whether `damaged_files` would read the files through."""
    return not _is_checked(folder) or any(
        _state(folder / file.name) != (file.size, file.mtime_ns) for file in kept
    )


def _kept(path: Path, file: RemoteFile, count: Count) -> KeptFile:
    state = path.stat()
    kind, _, announced = file.digest.partition(":")  # and found right when the file arrived
    digest = announced if kind == "sha256" else sha256_of(path, count)
    return KeptFile(path.name, state.st_size, state.st_mtime_ns, digest)


def _is_whole(path: Path, file: KeptFile, count: Count) -> bool:
    state = _state(path)
    return state is not None and state[0] == file.size and sha256_of(path, count) == file.sha256


def _state(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_size, state.st_mtime_ns


def _is_checked(folder: Path) -> bool:
    return (folder / _CHECKED / _boot()).exists()


def _mark_checked(folder: Path) -> None:
    (folder / _CHECKED).mkdir(exist_ok=True)
    (folder / _CHECKED / _boot()).touch()


def _boot() -> str:
    # The same in all pods of a node, and another one after its reboot.
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else "unknown"
