"""An artifact appears under a name made from its content, whole, and is never changed again.

Two runs that made the same bytes meet at the same path; two different results never do. So a job
killed while it publishes simply publishes again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mizzen.runtime.train.bucket import upload
from mizzen.runtime.train.card import CARD_FILE, Provenance, build_card
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.curve import CURVE_FILE
from mizzen.runtime.train.digest import ARTIFACT_FILE, BASE_WEIGHTS, digest_of, hash_files
from mizzen.runtime.train.durable import storage_faults_of, sync_path
from mizzen.runtime.train.oci_layout import write_oci_layout
from mizzen.runtime.train.progress import Artifact, Verdict

_NAME_DIGITS = 12


def publish(
    config: TrainConfig,
    write: Callable[[Path], None],
    *,
    step: int,
    verdicts: Sequence[Verdict],
    made_from: Provenance,
) -> Artifact:
    """Let `write` fill a folder and publish it as `<output directory>/<digest>`, and its copies.

    Raises:
        StorageFullError: there is no room.
        StorageNotWritableError: the claim refuses us.
        UploadRefusedError: the bucket refuses us.
        UploadFailedError: the bucket does not answer.
    """
    root = config.output.directory
    partial = root / f".partial-{config.job.replace('/', '-')}"
    with storage_faults_of("The artifact", root):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        curve = config.checkpoint.directory / CURVE_FILE
        if curve.exists():  # nothing was learned where not
            shutil.copyfile(curve, partial / CURVE_FILE)
        card = build_card(config, made_from, step=step, verdicts=verdicts)
        (partial / CARD_FILE).write_text(card)
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
        if config.output.kind == "adapter":
            document[BASE_WEIGHTS] = made_from.base_weights
        (partial / ARTIFACT_FILE).write_text(json.dumps(document, indent=2) + "\n")
        _install(partial, final, digest)
    return replace(artifact, copies=_copy(config, final, artifact.digest, hashes))


def _copy(
    config: TrainConfig, folder: Path, digest: str, hashes: Mapping[str, str]
) -> tuple[str, ...]:
    """Copy an artifact to where else it is wanted; return the copies' addresses."""
    copies: list[str] = []
    if (layout := config.output.oci_layout) is not None:
        name = config.job.rpartition("/")[2]
        manifest = write_oci_layout(layout, folder, hashes, name=name, digest=digest)
        copies.append(f"{layout}@{manifest}")
    if config.output.s3 is not None:
        copies.append(upload(config.output.s3, folder, [*hashes, ARTIFACT_FILE]))
    return tuple(copies)


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
