"""Where things lie in a cache's folder. Knows no model and no network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mizzen.runtime.sources.errors import StorageNotWritableError
from mizzen.runtime.sources.integrity import MANIFEST


class Places:
    """The folders of one cache; all processes that share it agree on them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Make the folders.

        Raises:
            StorageNotWritableError: that is not possible.
        """
        try:
            for name in ("models", "partial", "locks", "revisions"):
                # Whoever else can write here could change what a model says.
                (self.root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self.root / "models", os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise StorageNotWritableError(
                f"The cache {self.root} cannot be written to ({error.strerror}). Give a folder "
                "that can: --cache-dir, in a cluster spec.model.cache.claim."
            ) from error

    def model(self, entry: str) -> Path:
        """Return the folder of a complete model."""
        return self.root / "models" / entry

    def partial(self, entry: str) -> Path:
        """Return the folder of a model that is not complete."""
        return self.root / "partial" / entry

    def lock(self, entry: str) -> Path:
        """Return the lock of whoever fetches or checks an entry."""
        return self.root / "locks" / f"{entry}.lock"

    def users(self, entry: str) -> Path:
        """Return the lock that everybody shares who uses an entry."""
        return self.root / "locks" / f"{entry}.users"

    def revision(self, name: str) -> Path:
        """Return the file that remembers what an address meant the last time."""
        return self.root / "revisions" / f"{name}.json"

    def entries(self) -> Iterator[Path]:
        """Yield the folders of complete models."""
        for folder in sorted((self.root / "models").iterdir()):
            if (folder / MANIFEST).exists():
                yield folder

    def partials(self) -> Iterator[Path]:
        """Yield the folders of models that are not complete."""
        yield from sorted((self.root / "partial").iterdir())

    def remove(self, entry: str) -> None:
        """Remove an entry, complete or not."""
        self.remove_model(entry)
        self.remove_partial(entry)

    def remove_model(self, entry: str) -> None:
        """Remove a complete model. Interrupted, it leaves one that is not complete."""
        (self.model(entry) / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(self.model(entry), ignore_errors=True)

    def remove_partial(self, entry: str) -> None:
        """Remove what was fetched of a model."""
        shutil.rmtree(self.partial(entry), ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Return how many bytes of a model's files a folder holds; 0 where there is none."""
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        for file in found:
            with suppress(FileNotFoundError):  # finished or removed at this moment
                is_counted = file.is_file() and not file.name.startswith(".")
                total += file.stat().st_size if is_counted else 0
    return total
