"""What a hub and a bucket have in common: they list files and give them, and some are for us."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from mizzen.runtime.errors import (
    NotAModelError,
    PickledWeightsRefusedError,
    WeightsMissingError,
)
from mizzen.runtime.sources.errors import SourceNotFoundError

_ENTRY_NAME_CHARACTERS = 80
_DESCRIPTIONS = frozenset(
    {
        "config.json", "generation_config.json", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
        "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as its keeper lists it."""

    name: str  # without folders
    size: int  # bytes
    digest: str = ""  # "sha256:HEX" of the content or "git:HEX" of the blob, where it is known
    etag: str = ""  # by which a bucket tells versions apart


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one model at one revision, which never changes."""

    address: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def entry(self) -> str:
        """The folder in a cache that holds exactly these files."""
        place = self.address.partition("@")[0].replace("://", "--").replace("/", "--")
        identity = repr((place, self.revision, sorted(map(repr, self.files))))
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        return f"{place[:_ENTRY_NAME_CHARACTERS]}-{digest}"

    @property
    def only_file(self) -> str | None:
        """The name of the file that is the model, where one file is."""
        alone = len(self.files) == 1 and self.files[0].name.endswith(".gguf")
        return self.files[0].name if alone else None

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Listing:
        """Return the listing that `to_json` wrote.

        Raises:
            KeyError, TypeError: it is not such a document.
        """
        files = tuple(RemoteFile(**file) for file in document["files"])
        return cls(document["address"], document["revision"], files)


class Remote(Protocol):
    """A place that keeps models."""

    def list_files(self) -> Listing:
        """Return the files to bring here.

        Raises:
            SourceError: there are none, or not for us.
        """

    def fetch(self, file: RemoteFile, listing: Listing, to: Path) -> None:
        """Bring the rest of a file; what `to` holds already is its beginning.

        Raises:
            SourceError: it cannot be had.
            OSError: `to` cannot be written.
        """


def choose_files(address: str, files: Iterable[RemoteFile], *, only: str) -> list[RemoteFile]:
    """Return the files that a loader reads: weights, configuration and tokenizer, never code.

    Raises:
        SourceNotFoundError: `only` is not among them, or there is no file at all.
        BadModelError: they are no model, or none that may be loaded.
    """
    present = {file.name: file for file in files}
    if only:
        if only not in present:
            raise SourceNotFoundError(
                f"{address} does not exist: its folder has no file {only}. Correct its name."
            )
        return [present[only]]
    if not present:
        raise SourceNotFoundError(f"There are no files at {address}. Correct the model's source.")
    weights = sorted(name for name in present if name.endswith(".safetensors"))
    if not weights:
        return [present[_only_gguf(address, present)]]
    if "config.json" not in present:
        raise NotAModelError(f"{address} has weights but no config.json. Add it.")
    # Some repositories hold the same weights a second time, as their trainer wrote them.
    named = [name for name in weights if name.startswith("model")]
    return [
        present[name] for name in sorted({*(named or weights), *(_DESCRIPTIONS & set(present))})
    ]


def _only_gguf(address: str, present: Iterable[str]) -> str:
    found = sorted(name for name in present if name.endswith(".gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise NotAModelError(
            f"{address} holds {len(found)} .gguf files: name one of them, such as "
            f"{address}/{found[0]}."
        )
    if any(name.endswith(_PICKLES) for name in present):
        raise PickledWeightsRefusedError(
            f"{address} has its weights only as pickles (.bin or .pt) or in another form that is "
            "not read here. Convert them to safetensors."
        )
    raise WeightsMissingError(f"{address} has neither a .safetensors nor a .gguf file.")
