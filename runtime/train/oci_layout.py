"""An artifact as an OCI image layout: a folder that any OCI client copies to a registry as it is.

Source: OCI image specification 1.1, image-layout.md and manifest.md ("Guidelines for Artifact
Usage"). A blob is a file as it was published; the manifest names them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mizzen.runtime.train.durable import storage_faults_of, sync_path, write_durably

ARTIFACT_TYPE = "application/vnd.mizzen.artifact.v1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_EMPTY = b"{}"
_REF_NAME = "org.opencontainers.image.ref.name"
_TITLE = "org.opencontainers.image.title"
_MEDIA_TYPES = {".json": "application/json", ".md": "text/markdown", ".jinja": "text/plain"}


def write_oci_layout(
    layout: Path, artifact: Path, hashes: Mapping[str, str], *, name: str, digest: str
) -> str:
    """Add an artifact to a layout under a name; return its manifest's digest.

    A name that is there already moves to the new manifest; blobs that are there stay.

    Raises:
        StorageFullError: there is no room.
        StorageNotWritableError: the claim refuses us.
    """
    with storage_faults_of("The OCI layout", layout):
        blobs = layout / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        for file, sha256 in hashes.items():
            _add_file(blobs / sha256, artifact / file)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "artifactType": ARTIFACT_TYPE,
            "config": _add_bytes(blobs, _EMPTY, "application/vnd.oci.empty.v1+json"),
            "layers": [
                {
                    "mediaType": _MEDIA_TYPES.get(Path(file).suffix, "application/octet-stream"),
                    "digest": f"sha256:{sha256}",
                    "size": (artifact / file).stat().st_size,
                    "annotations": {_TITLE: file},
                }
                for file, sha256 in sorted(hashes.items())
            ],
            "annotations": {"dev.mizzen.artifact.digest": digest},
        }
        entry = _add_bytes(blobs, json.dumps(manifest).encode(), _MANIFEST)
        entry |= {"artifactType": ARTIFACT_TYPE, "annotations": {_REF_NAME: name}}
        with _alone_in(layout):
            _point_to(layout, entry, name)
    return str(entry["digest"])


def _point_to(layout: Path, entry: Mapping[str, Any], name: str) -> None:
    """Let a name stand for this manifest and for no other."""
    write_durably(layout / "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
    index_path = layout / "index.json"
    there = json.loads(index_path.read_bytes())["manifests"] if index_path.exists() else []
    others = [one for one in there if (one.get("annotations") or {}).get(_REF_NAME) != name]
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [*others, entry]}
    write_durably(index_path, json.dumps(index, indent=1).encode())


def _add_file(blob: Path, file: Path) -> None:
    if blob.exists():
        return
    partial = blob.with_name(f".{blob.name}.{os.getpid()}.partial")
    shutil.copyfile(file, partial)
    sync_path(partial)
    partial.rename(blob)


def _add_bytes(blobs: Path, content: bytes, media_type: str) -> dict[str, Any]:
    """Add a blob and return its descriptor."""
    sha256 = hashlib.sha256(content).hexdigest()
    write_durably(blobs / sha256, content)
    return {"mediaType": media_type, "digest": f"sha256:{sha256}", "size": len(content)}


@contextmanager
def _alone_in(layout: Path) -> Iterator[None]:
    """Keep other jobs from changing the index meanwhile."""
    with (layout / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
