"""What can be wrong with a file or a batch, in the shape OpenAI's clients know."""

from __future__ import annotations

from typing import ClassVar

from mizzen.runtime.gateway.errors import BadBodyError, GatewayError


class BatchesOffError(GatewayError):
    """This gateway has nowhere to keep files."""

    status = 501
    kind = "invalid_request_error"
    code = "batches_not_enabled"

    def __init__(self) -> None:
        super().__init__(
            "Files and batches are off: the gateway has no volume for them. Name one in the "
            "chart's gateway.batches.volume, or set --batches-dir."
        )


class BadUploadError(BadBodyError):
    """The upload is not what OpenAI's clients send."""


class FileTooLargeError(GatewayError):
    """The file is over the limit."""

    status = 413
    kind = "invalid_request_error"
    code = "file_too_large"

    def __init__(self, limit_mib: int) -> None:
        super().__init__(
            f"The file is larger than {limit_mib} MiB. Split it, or raise "
            "gateway.batches.maxFileMiB in the chart."
        )


class NotFoundError(GatewayError):
    """The key that asks has no such thing."""

    status = 404
    kind = "invalid_request_error"
    code = "not_found"
    what: ClassVar[str]

    def __init__(self, wanted: str) -> None:
        super().__init__(f"No {self.what} {wanted[:100]!r} of this API key was found.")


class NoSuchFileError(NotFoundError):
    """The key has no such file."""

    what = "file"


class NoSuchBatchError(NotFoundError):
    """The key has no such batch."""

    what = "batch"


class NotToCancelError(GatewayError):
    """The batch has ended already."""

    status = 409
    kind = "invalid_request_error"
    code = "batch_ended"


class TooManyBatchesError(GatewayError):
    """The key has enough batches that have not ended."""

    status = 429
    kind = "batches"
    code = "rate_limit_exceeded"


class VolumeError(GatewayError):
    """The volume does not take what is to be kept."""

    status = 507
    code = "storage_failed"

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"The gateway's volume for files fails ({error.strerror}); delete files, or "
            "ask whoever runs it for a larger one (gateway.batches.volume)."
        )
