"""What came of the requests: counted, and the answers that should not have been."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_MOST_FINDINGS = 50
OWN_TIMEOUT = "The request's timeout is over."
FAILED = "The server failed on this request."


@dataclass
class Tally:
    """Counts by part and answer; each finding once, with what caused it."""

    answers: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def http(self, part: str, what: str, answer: Any, sent: bytes) -> None:
        """Judge an HTTP answer: `status_code`, `headers` and `text`."""
        status, text = answer.status_code, answer.text
        if status < 500:
            self.count(part, str(status))
        elif status == 503 and "retry-after" in {name.lower() for name in answer.headers}:
            self.count(part, "503 come back later")
        elif status == 504 and OWN_TIMEOUT in text:
            self.count(part, "504 as the request wanted")
        else:
            self.find(part, f"{what}: {status} {text[:300]}", sent)

    def grpc(self, part: str, what: str, code: str, details: str, sent: bytes) -> None:
        """Judge a gRPC status."""
        own_timeout = code == "DEADLINE_EXCEEDED" and details == OWN_TIMEOUT
        is_lost = code == "RESOURCE_EXHAUSTED" and "metadata" in details  # the real one was longer
        if own_timeout or (code in _EARNED and not is_lost):
            self.count(part, code)
        else:
            self.find(part, f"{what}: {code} {details[:300]}", sent)

    def count(self, part: str, answer: str) -> None:
        """Count an answer that was in order."""
        with self._lock:
            self.answers[f"{part}: {answer}"] += 1

    def find(self, part: str, finding: str, sent: bytes) -> None:
        """Note an answer that should not have been."""
        with self._lock:
            self.answers[f"{part}: FOUND"] += 1
            if len(self.findings) < _MOST_FINDINGS:
                self.findings.setdefault(f"{part}: {finding}", repr(sent[:2000]))


# What a request can be to blame for.
_EARNED = frozenset(
    (
        *("OK", "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED"),
        *("RESOURCE_EXHAUSTED", "UNIMPLEMENTED"),
    )
)
