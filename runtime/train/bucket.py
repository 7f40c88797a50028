"""An artifact copied to an S3-compatible store, under its digest.

Credentials, region and endpoint come from the usual AWS_* variables, else from the platform.
Retries are obstore's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from mizzen.runtime.train.errors import UploadFailedError, UploadRefusedError

_RETRY_FOR = timedelta(seconds=60)


def upload(address: str, folder: Path, files: Iterable[str]) -> str:
    """Put a folder's files under `address`; return where they are, `address/<folder's name>`.

    The files come in the given order: who sees the last one can read all of them.

    Raises:
        UploadRefusedError: there is no such bucket, or not for us.
        UploadFailedError: the store did not answer; it may later.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    target = f"{prefix.strip('/')}/{folder.name}"
    try:
        store = S3Store(
            bucket,
            # Whoever writes http:// means it; stores inside a cluster often have no certificate.
            client_options={"allow_http": endpoint.startswith("http://")},
            retry_config={"max_retries": 6, "retry_timeout": _RETRY_FOR},
        )
        for file in files:
            obstore.put(store, f"{target}/{file}", folder / file)
    except (PermissionDeniedError, UnauthenticatedError, FileNotFoundError) as error:
        raise UploadRefusedError(address, _first_line(error)) from error
    except (BaseError, OSError) as error:
        raise UploadFailedError(address, _first_line(error)) from error
    return f"s3://{bucket}/{target}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
