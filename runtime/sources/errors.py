"""Why a model could not be brought here: each a reason of its own, and a sentence for people."""

from mizzen.runtime.errors import MizzenError


class SourceError(MizzenError):
    """The model's files cannot be had from where its source says."""

    reason = "SourceInvalid"


class SourceNotFoundError(SourceError):
    """There is no such repository, revision, bucket or file."""

    reason = "SourceNotFound"


class SourceForbiddenError(SourceError):
    """Whoever keeps the files wants another token or key for them."""

    reason = "SourceForbidden"


class SourceUnreachableError(SourceError):
    """No answer, or one that says to come back later: the same call may succeed then."""

    reason = "SourceUnreachable"
    exit_code = 1


class SourceNotCachedError(SourceError):
    """The network must not be used and the cache does not have the files."""

    reason = "SourceNotCached"


class ChecksumMismatchError(SourceError):
    """What arrives is not what the source promised, also at the second attempt."""

    reason = "ChecksumMismatch"


class CacheTooSmallError(SourceError):
    """The model is larger than all that the cache may hold."""

    reason = "CacheTooSmall"


class StorageFullError(SourceError):
    """The volume below the cache has no room left."""

    reason = "StorageFull"


class StorageNotWritableError(SourceError):
    """The cache's folder cannot be written to."""

    reason = "StorageNotWritable"
