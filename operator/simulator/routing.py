"""Which replica a prompt's beginning belongs to, bounded by load, as our gateway chooses.

The rule and its sources are runtime/gateway/placement.py's; a test holds the two together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from math import ceil, sqrt

from mizzen.operator.simulator.traces import Request

LOAD_FACTOR = 1.25  # the gateway's default
_NEVER_FULL = 4
_MASK = 2**64 - 1
# 1024 tokens. The gateway goes by the system prompt and the beginning of the first message; a trace
# does not tell where these end.
_KEY_BLOCKS = 2


def affinity_key(request: Request) -> int | None:
    """Return a number equal for prompts that begin alike, None where nothing of it is known."""
    beginning = request.prefix_ids[:_KEY_BLOCKS]
    return _bits(" ".join(map(str, beginning))) if beginning else None


def choose(loads: Sequence[tuple[str, int]], *, key: int) -> str:
    """Return the first replica of the key's order that has room; loads are requests in flight."""
    mean = (sum(load for _, load in loads) + 1) / len(loads)
    bound = max(_NEVER_FULL, ceil(max(LOAD_FACTOR * mean, mean + 2 * sqrt(mean))))
    with_room = [name for name, load in loads if load < bound]
    return max(with_room, key=lambda name: _rank(key, name))


def _rank(key: int, name: str) -> int:
    mixed = key ^ _bits(name)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return mixed ^ (mixed >> 31)


@lru_cache(maxsize=65536)
def _bits(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
