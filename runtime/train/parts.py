"""Tensors in safetensors files of several ranks, read again by any other number of ranks.

A file of one rank alone holds whole tensors. Where several share a model, each file says in its
metadata where its tensors lie in the whole ones; a reader takes what overlaps with its own part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mizzen.runtime.model.layers import TensorShard
from mizzen.runtime.train.errors import TensorsDifferError

_PARTS = "parts"
_FILE = re.compile(r"(\w+?)(-\d{5}-of-\d{5})?\.safetensors")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Where a rank's tensor begins in the whole one, whose shape is `whole`."""

    start: Shape
    whole: Shape


@dataclass(frozen=True, slots=True)
class Wanted:
    """A part to read, and how large it is."""

    part: Part
    shape: Shape


def part_of(shard: TensorShard) -> Part | None:
    """Return where a shard lies; None for a tensor that every rank holds whole."""
    if shard.rows is None and shard.columns is None:
        return None
    starts = (span.start if span else 0 for span in (shard.rows, shard.columns))
    return Part(tuple(starts)[: len(shard.whole)], shard.whole)


def write_tensors(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    parts: Mapping[str, Part] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> list[Path]:
    """Write a file for each kind of a rank's tensors; those without a part are whole."""
    suffix = f"-{rank + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""
    files = []
    for kind, named in tensors.items():
        held = {name: p for name, p in (parts or {}).items() if name in named}
        places = {name: [part.start, part.whole] for name, part in held.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in named.items()}
        files.append(folder / f"{kind}{suffix}.safetensors")
        metadata = {_PARTS: json.dumps(places)} if places else None
        save_file(contiguous, files[-1], metadata=metadata)
    return files


def files_by_kind(folder: Path, names: Iterable[str]) -> dict[str, list[Path]]:
    """Return which of a checkpoint's files hold tensors of each kind, by rank."""
    kinds: dict[str, list[Path]] = {}
    for name in sorted(names):
        if found := _FILE.fullmatch(name):
            kinds.setdefault(found[1], []).append(folder / name)
    return kinds


def read_tensors(
    paths: Sequence[Path], wanted: Mapping[str, Wanted]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of these files: of the wanted ones that part alone, all others whole.

    Raises:
        TensorsDifferError: a whole tensor has another shape than the wanted one, or a gap.
    """
    with ExitStack() as open_files:
        pieces: dict[str, list[_Piece]] = {}
        for path in paths:
            file = open_files.enter_context(safe_open(path, framework="pt"))
            for piece in _pieces(file):
                pieces.setdefault(piece.name, []).append(piece)
        for name, held in pieces.items():
            whole = held[0].place.whole
            yield name, _put_together(held, wanted.get(name) or Wanted(_all_of(whole), whole))


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one file holds of a tensor; its numbers are read when they are asked for."""

    name: str
    place: Part
    numbers: Any


def _pieces(file: Any) -> Iterator[_Piece]:
    places = json.loads((file.metadata() or {}).get(_PARTS, "{}"))
    for name in file.keys():  # noqa: SIM118 - no mapping
        numbers = file.get_slice(name)
        start, whole = places.get(name) or ([0] * len(numbers.get_shape()), numbers.get_shape())
        yield _Piece(name, Part(tuple(start), tuple(whole)), numbers)


def _all_of(whole: Shape) -> Part:
    return Part((0,) * len(whole), whole)


def _put_together(pieces: Sequence[_Piece], wanted: Wanted) -> Tensor:
    tensor = torch.empty(wanted.shape, dtype=pieces[0].numbers[:0].dtype)
    missing = tensor.numel()
    for piece in pieces:
        if piece.place.whole != wanted.part.whole:
            raise TensorsDifferError
        source, target = _overlap(piece, wanted)
        if all(span.start < span.stop for span in source):
            found = piece.numbers[source]
            tensor[target] = found
            missing -= found.numel()
    if missing:
        raise TensorsDifferError
    return tensor


def _overlap(piece: _Piece, wanted: Wanted) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return what piece and wanted part have in common, counted in each."""
    source, target = [], []
    sizes = zip(
        piece.place.start, piece.numbers.get_shape(), wanted.part.start, wanted.shape, strict=True
    )
    for at, size, start, count in sizes:
        low, high = max(at, start), min(at + size, start + count)
        source.append(slice(low - at, high - at))
        target.append(slice(low - start, high - start))
    return tuple(source), tuple(target)
