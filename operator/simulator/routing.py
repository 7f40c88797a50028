"""What of a prompt decides which replica it belongs to; the gateway's own rule does the rest."""

from __future__ import annotations

import hashlib

from mizzen.operator.simulator.traces import Request

LOAD_FACTOR = 1.25  # the gateway's default
# 1024 tokens. The gateway goes by the system prompt and the beginning of the first message; a trace
# does not tell where these end.
_KEY_BLOCKS = 2


def affinity_key(request: Request) -> int | None:
    """Return a number equal for prompts that begin alike, None where nothing of it is known."""
    beginning = request.prefix_ids[:_KEY_BLOCKS]
    if not beginning:
        return None
    name = " ".join(map(str, beginning)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
