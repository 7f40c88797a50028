"""Documents and bytes made wrong, each way of it drawn by a seeded generator. Sends nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

Path = tuple[Any, ...]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 0.5, 2**31, 2**63, 2**70, -(2**63), 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
    *("", " ", "\x00", "\ud800", "\udfff\ud800", "\U0010ffff", "²", "é" * 300, "x" * 20_000),
    *("../../../etc/passwd", "/mnt/pvc/\x00", "/mnt/pvc/" + "x" * 5000, "tiny", "%s%n{0}"),
    *('{"a":' * 400 + "1" + "}" * 400, "[" * 3000, "(a+)+$", "a{1000}{1000}", "start: start"),
    *([], {}, [[]], [None], [{}], {"": ""}, {"$ref": "#"}, {"type": "object"}, {"pattern": "("}),
    *([1] * 3000, ["x"] * 3000, {"a": {"b": {"c": 1}}}, [-1], [2**40], ["\ud800"]),
)


def places(document: Any, here: Path = ()) -> Iterator[Path]:
    """Yield the path of every value in a document, its own included."""
    yield here
    entries = document.items() if isinstance(document, dict) else ()
    entries = enumerate(document) if isinstance(document, list) else entries
    for key, value in entries:
        yield from places(value, (*here, key))


def odd_document(rng: Random, document: Any) -> Any:
    """Return a copy with up to three values replaced, dropped or added."""
    root = {"": copy.deepcopy(document)}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.choice([place for place in places(root) if place])
        parent = root
        for key in at[:-1]:
            parent = parent[key]
        parent[at[-1]] = _other(rng, parent[at[-1]])
    return root[""]


def _other(rng: Random, value: Any) -> Any:
    if rng.random() < 0.15 and isinstance(value, dict):
        return value | {rng.choice(("\ud800", "", "x" * 300, "n", "model")): _odd_value(rng)}
    if rng.random() < 0.15 and isinstance(value, dict) and value:
        gone = rng.choice(list(value))
        return {key: each for key, each in value.items() if key != gone}
    if rng.random() < 0.15 and isinstance(value, list):
        return value * rng.choice((0, 2, 40))
    return _odd_value(rng)


def _odd_value(rng: Random) -> Any:
    if rng.random() < 0.05:
        return _nested(rng.choice((50, 150, 300)))
    return copy.deepcopy(rng.choice(ODD_VALUES))


def as_json(document: Any) -> bytes:
    """Return a document as JSON: lone surrogates as escapes, NaN as JavaScript has it."""
    return json.dumps(document).encode()


def odd_bytes(rng: Random, data: bytes) -> bytes:
    """Return the bytes cut, changed, doubled, mixed or left as they are."""
    size = len(data)
    cut, end = sorted((rng.randint(0, size), rng.randint(0, size)))
    noise = rng.randbytes(rng.choice((1, 2, 8, 64)))
    match rng.randrange(8):
        case 0:
            return data
        case 1:
            return data[:cut]
        case 2:
            return data[cut:]
        case 3:
            return data[:cut] + noise + data[cut:]
        case 4:
            return data[:cut] + data[end:]
        case 5:
            return data[:cut] + data[cut:end] * 2 + data[end:]
        case 6:
            return data[:cut] + b"\xff" * rng.choice((1, 5, 10)) + data[cut:]
        case _:
            flipped = bytearray(data or b"\0")
            for _ in range(rng.randint(1, 4)):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            return bytes(flipped)
