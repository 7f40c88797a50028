"""What an artifact's content is called. Imports no torch: servers check what trainers wrote."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from mizzen.runtime.train.durable import sha256_of

ARTIFACT_FILE = "artifact.json"
BASE_WEIGHTS = "baseWeights"  # in it, of an adapter: the mark of what it was trained beside
# So many parts, evenly spread over a file, tell two trainings apart: they differ nearly everywhere.
_PARTS = 64
_PART_BYTES = 64 * 1024
# Where neither of the first is there, a base for Hugging Face's Trainer may have pickles.
_WEIGHTS = ((".safetensors", ".gguf"), (".bin",))
# Of the names of policies in training. No adapter that is loaded by name has a colon.
POLICY_PREFIX = "policy:"


def hash_files(folder: Path) -> dict[str, str]:
    """Return each file's sha256 by its path in the folder, without the artifact's own record."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    hashes.pop(ARTIFACT_FILE, None)
    return hashes


def model_digest(checkpoint: Path) -> str:
    """Return the digest of a model: of its one GGUF file, or of all files of its folder."""
    return sha256_of(checkpoint) if checkpoint.is_file() else digest_of(hash_files(checkpoint))


def digest_of(hashes: dict[str, str]) -> str:
    """Return the artifact's digest: of the lines `sha256  name`, as `sha256sum` prints them."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def policy_name(body: bytes) -> str:
    """Return what a policy in training is called: trainer and replica work it out alike."""
    return f"{POLICY_PREFIX}{hashlib.sha256(body).hexdigest()}"


def mark_model(checkpoint: Path) -> str:
    """Return what a model's files are told apart by, taken in a moment at any size.

    Sizes and parts of each file count, so that a model that was trained further, merged or
    quantized is another; a single changed weight may go unseen.
    """
    files = checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint]
    return _mark(
        (path.relative_to(checkpoint).as_posix() if path != checkpoint else "", path)
        for path in sorted(path for path in files if path.is_file())
    )


def mark_weights(model: Path) -> str:
    """Return the same of a model's weights alone, whatever their files and folder are called.

    Copies of one model have different notes and configurations beside their weights.

    Raises:
        OSError: there are none, or they cannot be read.
    """
    files = sorted(model.iterdir() if model.is_dir() else [model])
    for suffixes in _WEIGHTS:
        if weights := [path for path in files if path.suffix in suffixes]:
            return _mark(("", path) for path in weights)
    raise FileNotFoundError(f"There are no weights in {model}.")


def base_weights_of(adapter: Path) -> str | None:
    """Return the mark of the weights that an adapter was trained beside; None if it does not say.

    Those of others do not, nor do those of earlier versions.
    """
    try:
        document = json.loads((adapter / ARTIFACT_FILE).read_bytes())
    except (OSError, ValueError):
        return None
    mark = document.get(BASE_WEIGHTS) if isinstance(document, dict) else None
    return mark if isinstance(mark, str) else None


def _mark(files: Iterable[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            for part in range(_PARTS):
                file.seek(max(0, size - _PART_BYTES) * part // (_PARTS - 1))
                digest.update(file.read(_PART_BYTES))
    return digest.hexdigest()
