"""How many tokens a request takes: guessed before its answer, read from the answer after."""

from __future__ import annotations

import re
from collections.abc import Mapping

_BYTES_PER_TOKEN = 4
_TAIL_BYTES = 2048
_TOTAL = re.compile(rb'"total_tokens"\s*:\s*(\d{1,12})')
_EVENT = b"data: "


def expected_tokens(document: Mapping[str, object], size_bytes: int) -> int:
    """Return a guess: four bytes of the body to a token, and the answer at its longest if said."""
    most = document.get("max_completion_tokens") or document.get("max_tokens")
    answer = most if isinstance(most, int) and most > 0 else 0
    return size_bytes // _BYTES_PER_TOKEN + answer


class TokenMeter:
    """Reads the usage an answer ends with; a stream without one is counted by its events."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._events = 0
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        """Take the next piece of the answer."""
        self._events += chunk.count(_EVENT)
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]

    def used(self) -> int:
        """Return the tokens used so far: none before the answer has begun."""
        if not self._tail:
            return 0
        if found := _TOTAL.findall(self._tail):
            return int(found[-1])
        return self._prompt_tokens + self._events
