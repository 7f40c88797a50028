"""Models on a hub that speaks Hugging Face's HTTP API.

The repository's revision is resolved once, to the commit that all files are then asked of, so a
push in the middle mixes nothing. Retries, back-off after 429 and the token are huggingface_hub's.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its __init__ imports lazily
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)
from huggingface_hub.utils.tqdm import disable_progress_bars
from pydantic import BaseModel, Field, ValidationError

from mizzen.runtime.sources.address import HubAddress, folder_and_file
from mizzen.runtime.sources.errors import (
    SourceError,
    SourceForbiddenError,
    SourceNotFoundError,
    SourceUnreachableError,
)
from mizzen.runtime.sources.remote import Listing, RemoteFile, choose_files

_TIMEOUT_S = 30.0
_TOKEN_HINT = (
    "Give a token that may read it: the environment variable HF_TOKEN, in a cluster from the "
    "Secret named in spec.model.credentials."
)


class _Lfs(BaseModel):
    sha256: str


class _Sibling(BaseModel):
    rfilename: str  # with its folders
    size: int = 0
    blob_id: str = Field("", alias="blobId")
    lfs: _Lfs | None = None


class _Repository(BaseModel):
    sha: str  # of the commit
    siblings: list[_Sibling] = Field(default_factory=list)


class Hub:
    """One repository."""

    def __init__(self, address: HubAddress) -> None:
        self._address = address
        self._folder, self._only = folder_and_file(address.path)
        # Read anew: the library reads it when it is imported.
        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        disable_progress_bars()  # the bytes are counted for those who ask
        # It logs the addresses it asks, and those of a hub's stores are keys to the files.
        logging.getLogger("httpx2").setLevel(logging.WARNING)

    def list_files(self) -> Listing:
        """Return the files to bring here.

        Raises:
            SourceError: there are none, or not for us.
            BadModelError: they are no model that may be loaded.
        """
        address = self._address
        revision = address.revision.replace("/", "%2F")
        url = f"{self._endpoint}/api/models/{address.repository}/revision/{revision}"
        try:
            answer = http_backoff(
                "GET", url, params={"blobs": True}, headers=build_hf_headers(), timeout=_TIMEOUT_S
            )
            hf_raise_for_status(answer)
            repository = _Repository.model_validate_json(answer.content)
        except (HTTPError, OSError) as error:
            raise self._explained(error) from error
        except ValidationError as error:
            raise SourceUnreachableError(
                f"{self._endpoint} answers, but not as a hub does. Check HF_ENDPOINT."
            ) from error
        files = choose_files(str(address), self._files(repository), only=self._only)
        return Listing(str(address), repository.sha, tuple(files))

    def fetch(self, file: RemoteFile, listing: Listing, to: Path) -> None:
        """Bring the rest of a file; what `to` holds already is its beginning.

        Raises:
            SourceError: it cannot be had.
            OSError: `to` cannot be written.
        """
        url = hf_hub_url(
            self._address.repository,
            file.name,
            subfolder=self._folder or None,
            revision=listing.revision,
            endpoint=self._endpoint,
        )
        with to.open("ab") as stream:
            try:
                http_get(url, stream, resume_size=stream.tell(), headers=build_hf_headers())
            except HTTPError as error:
                raise self._explained(error) from error
            except OSError as error:
                if error.errno is not None:
                    raise  # the disk's, not the hub's
                raise self._explained(error) from error

    def _files(self, repository: _Repository) -> list[RemoteFile]:
        prefix = f"{self._folder}/" if self._folder else ""
        return [
            RemoteFile(
                name=sibling.rfilename.removeprefix(prefix),
                size=sibling.size,
                digest=f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}",
            )
            for sibling in repository.siblings
            if sibling.rfilename.startswith(prefix)
            and "/" not in sibling.rfilename.removeprefix(prefix)
        ]

    def _explained(self, error: Exception) -> SourceError:
        name, revision = self._address.repository, self._address.revision
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, GatedRepoError):
            return SourceForbiddenError(
                f"The hub gives {name} only to those who accepted its terms. Accept them on its "
                f"page. {_TOKEN_HINT}"
            )
        if isinstance(error, RevisionNotFoundError):
            return SourceNotFoundError(f"{name} has no revision {revision}. Correct it.")
        if isinstance(error, RemoteEntryNotFoundError):
            return SourceNotFoundError(f"{name} lost a file at {revision} while it was fetched.")
        if status == 404:
            return SourceNotFoundError(
                f"The hub has no repository {name} (404). Correct the model's source."
            )
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return SourceForbiddenError(
                f"The hub does not give {name} to us ({status}): it does not exist, or it is "
                f"private. {_TOKEN_HINT}"
            )
        what = f"answers {status}" if status else f"cannot be reached ({type(error).__name__})"
        return SourceUnreachableError(
            f"The hub {what}, also after several attempts. They go on; check that pods may reach "
            f"{self._endpoint}."
        )
