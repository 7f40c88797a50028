"""Models in a bucket of an S3-compatible store.

Credentials, region and endpoint come from the usual AWS_* variables, else from the platform (web
identity, container or instance roles). Retries are obstore's. An object's ETag is asked for with
each part of it, so one that is replaced meanwhile is refused instead of mixed.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from mizzen.runtime.sources.address import BucketAddress, folder_and_file
from mizzen.runtime.sources.errors import (
    SourceError,
    SourceForbiddenError,
    SourceNotFoundError,
    SourceUnreachableError,
)
from mizzen.runtime.sources.remote import Listing, RemoteFile, choose_files

_CHUNK_BYTES = 8 * 2**20
_RETRY_FOR = timedelta(seconds=60)
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_INSTANCE_ROLES = "169.254."  # where a cloud's machines ask for their credentials


class Bucket:
    """The objects of one folder of a bucket."""

    def __init__(self, address: BucketAddress) -> None:
        self._address = address
        self._folder, self._only = folder_and_file(address.path)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        self._store = S3Store(
            address.bucket,
            # Whoever writes http:// means it; stores inside a cluster often have no certificate.
            client_options={"allow_http": endpoint.startswith("http://")},
            retry_config={"max_retries": 6, "retry_timeout": _RETRY_FOR},
        )

    def list_files(self) -> Listing:
        """Return the files to bring here; the revision is made of their ETags.

        Raises:
            SourceError: there are none, or not for us.
            BadModelError: they are no model that may be loaded.
        """
        try:
            found = obstore.list_with_delimiter(self._store, prefix=self._folder or None)
        except (BaseError, OSError) as error:
            raise self._explained(error) from error
        files = [
            RemoteFile(
                name=meta["path"].rpartition("/")[2], size=meta["size"], etag=meta["e_tag"] or ""
            )
            for meta in found["objects"]
        ]
        chosen = choose_files(str(self._address), files, only=self._only)
        return Listing(str(self._address), "", tuple(chosen))

    def fetch(self, file: RemoteFile, listing: Listing, to: Path) -> None:
        """Bring the rest of a file; what `to` holds already is its beginning.

        Raises:
            SourceError: it cannot be had.
            OSError: `to` cannot be written.
        """
        key = f"{self._folder}/{file.name}" if self._folder else file.name
        with to.open("ab") as stream:
            try:
                answer = obstore.get(
                    self._store,
                    key,
                    options={"if_match": file.etag or None, "range": {"offset": stream.tell()}},
                )
                chunks = answer.stream(min_chunk_size=_CHUNK_BYTES)
                while (chunk := next(chunks, None)) is not None:
                    stream.write(chunk)
            except (BaseError, FileNotFoundError) as error:
                raise self._explained(error) from error

    def _explained(self, error: Exception) -> SourceError:
        text = str(error)
        status = found[1] if (found := _STATUS.search(text)) else ""
        code = found[1] if (found := _CODE.search(text)) else ""
        bucket = self._address.bucket
        if isinstance(error, PreconditionError):
            return SourceUnreachableError(
                f"A file of {self._address} was replaced while it was fetched. It is fetched anew."
            )
        if code == "NoSuchBucket":
            return SourceNotFoundError(f"There is no bucket {bucket}. Correct the model's source.")
        if isinstance(error, FileNotFoundError) or status == "404":
            return SourceNotFoundError(f"{self._address} lost a file while it was fetched.")
        is_forbidden = isinstance(error, UnauthenticatedError | PermissionDeniedError)
        has_nothing = _INSTANCE_ROLES in text
        if is_forbidden or has_nothing or status in ("401", "403"):
            why = "there are no credentials" if has_nothing else code or status
            return SourceForbiddenError(
                f"The bucket {bucket} is not open to us ({why}). Give AWS_ACCESS_KEY_ID "
                "and AWS_SECRET_ACCESS_KEY that may list and read it, in a cluster by the Secret "
                "named in spec.model.credentials."
            )
        what = f"answers {status}" if status else "cannot be reached"
        return SourceUnreachableError(
            f"The store of bucket {bucket} {what}, also after several attempts. They go on; check "
            "AWS_ENDPOINT_URL_S3, AWS_REGION and that pods may reach it."
        )
