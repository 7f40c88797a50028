"""What a model's source says: which repository, revision or bucket, and which file in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

from mizzen.runtime.sources.errors import SourceError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB = re.compile(rf"hf://({_NAME}/{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._%-]*))?(?:/(.+))?")
_BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]*[a-z0-9])/(.+)")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """`hf://ORG/NAME[@REVISION][/PATH]`; a slash in a revision is written %2F."""

    repository: str
    revision: str = "main"
    path: str = ""  # a folder in the repository, or one .gguf file

    def __str__(self) -> str:
        return f"hf://{self.repository}@{self.revision}" + (f"/{self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """What clients call the model unless told otherwise."""
        return _stem(self.path) or self.repository.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class BucketAddress:
    """`s3://BUCKET/PREFIX`: a folder of files, or one .gguf object."""

    bucket: str
    path: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.path}"

    @property
    def name(self) -> str:
        """What clients call the model unless told otherwise."""
        return _stem(self.path)


Address = HubAddress | BucketAddress


def folder_and_file(path: str) -> tuple[str, str]:
    """Return the folder that a path means and, where it means one file in it, that file's name."""
    if not path.endswith(".gguf"):
        return path, ""
    folder, _, name = path.rpartition("/")
    return folder, name


def parse_address(source: str) -> Address | None:
    """Return the remote place that `source` names, or None for a path on this machine.

    Raises:
        SourceError: it has a scheme of ours but not its form.
    """
    if not source.startswith(("hf://", "s3://")):
        return None
    if found := _HUB.fullmatch(source):
        path = _checked_path(found[3] or "")
        return HubAddress(found[1], unquote(found[2] or "main"), path)
    if found := _BUCKET.fullmatch(source):
        return BucketAddress(found[1], _checked_path(found[2]))
    raise SourceError(
        f"{source} is no address of a model: write hf://ORG/NAME, hf://ORG/NAME@REVISION or "
        "s3://BUCKET/PREFIX."
    )


def _checked_path(path: str) -> str:
    path = path.strip("/")
    if ".." in PurePosixPath(path).parts:
        raise SourceError(f"The path {path} in the model's source must not contain '..'.")
    return path


def _stem(path: str) -> str:
    last = PurePosixPath(path)
    return last.stem if last.suffix == ".gguf" else last.name
