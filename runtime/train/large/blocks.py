"""A dataset is cut into blocks of whole lines, each read by itself. Knows nothing of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mizzen.runtime.errors import MizzenError
from mizzen.runtime.train.config import Dataset
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.sources import (
    check_digest,
    is_array,
    load_feedback,
    open_dataset,
    parse_array,
)

# As Python objects a block's rows take several times as much, in each process.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some lines of a file; `is_placed` where each says of itself where its row stood before."""

    dataset: int  # its place among the job's
    path: str
    start: int
    size: int
    first_line: int
    is_placed: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A dataset in blocks, and the digest of its bytes."""

    dataset: Dataset
    blocks: tuple[Block, ...]
    digest: str


def cut_all(
    datasets: Sequence[Dataset], shape: Shape, scratch: Path, *, block_bytes: int = BLOCK_BYTES
) -> tuple[list[Cut], MizzenError | None]:
    """Return the datasets up to the first that cannot be read, and why that cannot.

    Not raised, because a bad row of a dataset before it is to be reported first.
    """
    cuts: list[Cut] = []
    for number, dataset in enumerate(datasets):
        try:
            cuts.append(_cut(dataset, number, shape, scratch, block_bytes))
        except MizzenError as error:
            return cuts, error
    return cuts, None


def _cut(dataset: Dataset, number: int, shape: Shape, scratch: Path, block_bytes: int) -> Cut:
    rewritten = scratch / f"rows-{number}"
    if dataset.feedback is not None:
        rows, digest = load_feedback(dataset, shape)
        blocks, _ = _write_placed(rows, rewritten, number, block_bytes)
        return Cut(dataset, blocks, digest)
    kept = scratch / f"fetched-{number}"
    with open_dataset(dataset, kept) as file:
        if not is_array(file):
            path = dataset.path or kept
            blocks, digest = _cut_lines(file, path, number, block_bytes, is_placed=False)
            check_digest(dataset, digest)
            return Cut(dataset, blocks, digest)
        raw = file.read()  # an array can only be parsed whole
    digest = hashlib.sha256(raw).hexdigest()
    check_digest(dataset, digest)
    blocks, _ = _write_placed(parse_array(dataset.name, raw), rewritten, number, block_bytes)
    return Cut(dataset, blocks, digest)


def _write_placed(
    rows: Iterable[tuple[str, object]], path: Path, number: int, block_bytes: int
) -> tuple[tuple[Block, ...], str]:
    """Write rows as lines that bear their places, and cut those."""
    with path.open("w+b") as file:
        for row in rows:
            file.write(json.dumps(row).encode() + b"\n")
        file.seek(0)
        return _cut_lines(file, path, number, block_bytes, is_placed=True)


def _cut_lines(
    file: BinaryIO, path: Path, number: int, block_bytes: int, *, is_placed: bool
) -> tuple[tuple[Block, ...], str]:
    blocks: list[Block] = []
    digest, start, line = hashlib.sha256(), 0, 1
    while raw := file.read(block_bytes) + file.readline():
        digest.update(raw)
        blocks.append(
            Block(
                dataset=number,
                path=str(path),
                start=start,
                size=len(raw),
                first_line=line,
                is_placed=is_placed,
            )
        )
        start, line = start + len(raw), line + raw.count(b"\n")
    return tuple(blocks), digest.hexdigest()
