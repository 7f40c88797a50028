"""Which replica a key belongs to, bounded by load. Pure: all gateways answer alike.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998)
gives every key its own order of the replicas; a replica that comes or goes moves only the keys it
gets or had. The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, 2016, arXiv:1608.01350): no replica gets more than `load_factor` times the mean, and
a key whose replica is full goes to the next of its order. As that order differs from key to key,
a hot replica's overflow spreads over all others (Chen, Coleman and Shrivastava, 2021,
arXiv:1908.08762) and does not fall on one neighbour.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

_MASK = 2**64 - 1
# Below this many requests a replica is never full: a batch that small costs its members little,
# and the mean of a few requests says nothing.
_NEVER_FULL = 4


@dataclass(frozen=True, slots=True)
class Load:
    """What one gateway has given a replica to do."""

    url: str
    in_flight: int
    last_turn: int = 0


def choose_replica(loads: Sequence[Load], *, key: int | None, load_factor: float) -> Load | None:
    """Return the first replica in the key's order that has room; without a key the least loaded.

    Equally loaded replicas take turns: the one whose last turn is longest ago goes first.
    """
    if key is None or len(loads) < 2:
        return min(loads, key=lambda load: (load.in_flight, load.last_turn), default=None)
    bound = most_in_flight(sum(load.in_flight for load in loads), len(loads), load_factor)
    # Never empty: were all at the bound, their sum would be above itself.
    with_room = [load for load in loads if load.in_flight < bound]
    return max(with_room, key=lambda load: affinity(key, load.url))


def most_in_flight(in_flight: int, replicas: int, load_factor: float) -> int:
    """Return how many requests one replica may have, the next one included.

    Two standard deviations of a random placement are allowed where the factor allows less: a few
    requests differ by that much whoever places them, and to move them would only cost cache hits.
    """
    mean = (in_flight + 1) / replicas
    return max(_NEVER_FULL, math.ceil(max(load_factor * mean, mean + 2 * math.sqrt(mean))))


def affinity(key: int, url: str) -> int:
    """Return a replica's rank for a key, the highest first: 64 bits mixed from both.

    Source of the mixing: splitmix64's finalizer (Steele, Lea and Flood, 2014).
    """
    mixed = key ^ _url_bits(url)
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    return mixed ^ (mixed >> 31)


@lru_cache(maxsize=65536)
def _url_bits(url: str) -> int:
    return int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), "big")
