"""How far a pod's model has come: what its runtime says, for the status and for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from mizzen.operator.status.conditions import Document, parse_rfc3339, rfc3339

_GIB = 2**30
_MIB = 2**20
_WORDS = {
    "Listing": "The model's files are being looked up",
    "Waiting": "The model is being fetched by another replica",
    "Downloading": "The model is being fetched",
    "Checking": "The model's files are being checked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """One look at it; what the runtime has not measured yet is None, never zero."""

    stage: str
    observed_at: datetime
    bytes: int | None = None
    total_bytes: int | None = None
    bytes_per_second: int | None = None
    remaining_seconds: int | None = None

    @property
    def done_ratio(self) -> float:
        """How much of it is done."""
        return (self.bytes or 0) / self.total_bytes if self.total_bytes else 0.0

    @property
    def is_moving(self) -> bool:
        """Whether bytes come: what kept an earlier attempt from them is over."""
        return bool(self.bytes)

    @property
    def sentence(self) -> str:
        """The same for people."""
        words = _WORDS.get(self.stage, "The model's files are being brought")
        if self.bytes is None or self.total_bytes is None:
            return f"{words}."
        sentence = f"{words}: {self.bytes / _GIB:.2f} of {self.total_bytes / _GIB:.2f} GiB"
        if self.bytes_per_second and self.remaining_seconds is not None:
            rate = self.bytes_per_second / _MIB
            sentence += f" at {rate:.1f} MiB/s, about {self.remaining_seconds} s left"
        return f"{sentence}."

    def to_api(self) -> Document:
        """Return the entry of a pod's status."""
        document: Document = {"stage": self.stage, "observedAt": rfc3339(self.observed_at)}
        numbers = {
            "bytes": self.bytes,
            "totalBytes": self.total_bytes,
            "bytesPerSecond": self.bytes_per_second,
            "remainingSeconds": self.remaining_seconds,
        }
        return document | {name: value for name, value in numbers.items() if value is not None}


def parse_loading(document: Mapping[str, object], *, observed_at: datetime) -> Loading | None:
    """Return what a runtime said, None where it brings nothing or says something else."""
    stage = document.get("stage")
    if not isinstance(stage, str):
        return None

    def number(name: str) -> int | None:
        value = document.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    return Loading(
        stage=stage,
        observed_at=observed_at,
        bytes=number("bytes"),
        total_bytes=number("totalBytes"),
        bytes_per_second=number("bytesPerSecond"),
        remaining_seconds=number("remainingSeconds"),
    )


def told_loading(pod: Mapping[str, object]) -> Loading | None:
    """Return what a pod's entry in the status says, None where it says nothing of it."""
    document = pod.get("loading")
    if not isinstance(document, Mapping):
        return None
    return parse_loading(document, observed_at=parse_rfc3339(str(document["observedAt"])))


def slowest(looks: Iterable[Loading]) -> Loading | None:
    """Return the one that all the others will have to be waited for with."""
    return min(looks, key=lambda loading: loading.done_ratio, default=None)
