"""An artifact appears under a name made from its content, whole, and is never changed again.

Two runs that made the same bytes meet at the same path; two different results never do. So a job
killed while it publishes simply publishes again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.durable import sha256_of, storage_faults_of, sync_path
from mizzen.runtime.train.progress import Artifact, Verdict

ARTIFACT_FILE = "artifact.json"
_NAME_DIGITS = 12


def publish(
    config: TrainConfig, write: Callable[[Path], None], *, step: int, verdicts: Sequence[Verdict]
) -> Artifact:
    """Let `write` fill a folder and publish it as `<output directory>/<digest>`.

    Raises:
        StorageFullError: there is no room.
        StorageNotWritableError: the claim refuses us.
    """
    root = config.output.directory
    partial = root / f".partial-{config.job.replace('/', '-')}"
    with storage_faults_of("The artifact", root):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        hashes = hash_files(partial)
        digest = digest_of(hashes)
        final = root / digest[:_NAME_DIGITS]
        artifact = Artifact(
            kind=config.output.kind,
            path=str(final),
            digest=f"sha256:{digest}",
            bytes=sum((partial / name).stat().st_size for name in hashes),
        )
        document = {
            **asdict(artifact),
            "files": hashes,
            "job": config.job,
            "baseModel": str(config.base_model),
            "step": step,
            "evaluation": [asdict(verdict) for verdict in verdicts],
        }
        (partial / ARTIFACT_FILE).write_text(json.dumps(document, indent=2) + "\n")
        _install(partial, final, digest)
    return artifact


def hash_files(folder: Path) -> dict[str, str]:
    """Return each file's sha256 by its path in the folder, without the artifact's own record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    hashes.pop(ARTIFACT_FILE, None)
    return hashes


def digest_of(hashes: dict[str, str]) -> str:
    """Return the artifact's digest: of the lines `sha256  name`, as `sha256sum` prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _install(partial: Path, final: Path, digest: str) -> None:
    """Give the finished folder its name; one that is there already and whole stays."""
    if final.exists():
        if digest_of(hash_files(final)) == digest:
            shutil.rmtree(partial)
            return
        # What lies there does not hash to its own name, so it is no artifact any more.
        shutil.rmtree(final)
    for path in partial.rglob("*"):
        # safetensors makes private files, and who serves them may be another user.
        path.chmod(0o644)
        sync_path(path)
    sync_path(partial)
    partial.rename(final)
    sync_path(final.parent)
