"""What the API server refuses, as types that say whether trying again can help.

Texts hold no object names and no times, so that a condition made of one does not flap.
"""

from typing import Any, ClassVar


class KubeError(Exception):
    """Base of all answers that are not a success."""

    reason: ClassVar[str] = "ApiError"
    retry: ClassVar[bool] = True

    def __init__(self, message: str = "", *, status: int = 0) -> None:
        super().__init__(message or self.__doc__ or "")
        self.status = status


class Conflict(KubeError):
    """The object changed meanwhile; it is read and decided again."""

    reason = "Conflict"


class AlreadyExists(Conflict):
    """An object of this name exists already."""

    reason = "AlreadyExists"


class NotFound(KubeError):
    """The object or its namespace does not exist."""

    reason = "NotFound"


class Forbidden(KubeError):
    """The API server forbids this; check the operator's role, quotas and admission policies."""

    reason = "Forbidden"


class QuotaExceeded(Forbidden):
    """A ResourceQuota of the namespace is used up; raise it or free some of it."""

    reason = "QuotaExceeded"


class Invalid(KubeError):
    """The API server calls the object invalid; only a changed spec can mend that."""

    reason = "Invalid"
    retry = False


class Throttled(KubeError):
    """The API server asks for patience."""

    reason = "Throttled"

    def __init__(
        self, message: str = "", *, status: int = 429, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status=status)
        self.retry_after_s = retry_after_s


class Unauthorized(KubeError):
    """The API server does not accept the operator's token."""

    reason = "Unauthorized"


class Unavailable(KubeError):
    """The API server does not answer."""

    reason = "Unavailable"


_BY_STATUS: dict[int, type[KubeError]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Conflict,
    422: Invalid,
}


def error_from(status: int, body: dict[str, Any], *, retry_after: str | None = None) -> KubeError:
    """Return the error for an HTTP status and the API server's Status document."""
    if status == 429:
        return Throttled(status=status, retry_after_s=_seconds(retry_after))
    if status >= 500 or status == 0:
        return Unavailable(status=status)
    if body.get("reason") == "AlreadyExists":
        return AlreadyExists(status=status)
    if status == 403 and "exceeded quota" in str(body.get("message", "")):
        return QuotaExceeded(status=status)
    kind = _BY_STATUS.get(status, Invalid)
    if kind is Invalid:
        return Invalid(_causes(body), status=status)
    return kind(status=status)


def _causes(body: dict[str, Any]) -> str:
    """Return which fields are wrong and why, leaving out the object's name."""
    causes = (body.get("details") or {}).get("causes") or []
    lines = sorted({f"{cause.get('field')}: {cause.get('message')}" for cause in causes})
    return "The API server refuses: " + "; ".join(lines) if lines else ""


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after and retry_after.isdigit() else None
