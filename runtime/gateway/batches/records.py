"""What a file and a batch are, as they are written down and as OpenAI's clients see them. Pure."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

Status = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED = frozenset(("completed", "failed", "expired", "cancelled"))
_TIMES = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at"),
    *("cancelling_at", "cancelled_at"),
)


def new_id(prefix: str) -> str:
    """Return a name that nobody can guess."""
    return prefix + uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of one key: what was uploaded, or what a batch has written."""

    id: str
    filename: str
    purpose: str
    size_bytes: int
    created_at_s: int
    expires_at_s: int

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Read it as `asdict` wrote it."""
        return cls(**fields)

    def document(self) -> dict[str, object]:
        """Return it as OpenAI's clients know it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size_bytes,
            "created_at": self.created_at_s,
            "expires_at": self.expires_at_s,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch of one key; the pod that runs it is the only one that writes it."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at_s: int
    expires_at_s: int
    # Their names are known from the start, so that a pod that goes on knows what is done.
    output_id: str = field(default_factory=lambda: new_id("file-"))
    errors_id: str = field(default_factory=lambda: new_id("file-"))
    has_output: bool = False
    has_errors: bool = False
    metadata: Mapping[str, str] | None = None
    status: Status = "validating"
    total: int = 0
    completed: int = 0
    failed: int = 0
    times_s: Mapping[str, int] = field(default_factory=dict)
    errors: tuple[Mapping[str, object], ...] = ()

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Self:
        """Read it as `asdict` wrote it."""
        return cls(**{**fields, "errors": tuple(fields["errors"])})

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ENDED

    def moved(self, status: Status, now_s: int, **changes: Any) -> Batch:
        """Return it in its next status."""
        times_s = {**self.times_s, f"{status}_at": now_s}
        return replace(self, status=status, times_s=times_s, **changes)

    def document(self) -> dict[str, object]:
        """Return it as OpenAI's clients know it."""
        errors = {"object": "list", "data": list(self.errors)} if self.errors else None
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_id if self.has_output else None,
            "error_file_id": self.errors_id if self.has_errors else None,
            "created_at": self.created_at_s,
            "expires_at": self.expires_at_s,
            **{name: self.times_s.get(name) for name in _TIMES},
            "request_counts": {
                "total": self.total,
                "completed": self.completed,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }


def to_fields(record: StoredFile | Batch) -> dict[str, Any]:
    """Return what `parse` reads."""
    return asdict(record)
