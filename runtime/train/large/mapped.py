"""Items in an Arrow file, of which only those in use are in memory.

A row has two lists of tokens where it is a preference and no labels where it is a prompt, so that
an item's kind need not be written down.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa

from mizzen.runtime.train.samples import Item, Pair, Prompt, Rating, Sample

_SCHEMA = pa.schema(
    [
        ("token_ids", pa.list_(pa.int32())),
        ("is_label", pa.list_(pa.bool_())),
        ("rejected_token_ids", pa.list_(pa.int32())),
        ("rejected_is_label", pa.list_(pa.bool_())),
        ("is_liked", pa.bool_()),
        ("answer", pa.binary()),
    ]
)


def encode(items: Sequence[Item]) -> bytes:
    """Return a block's items as one record batch in Arrow's stream format."""
    rows = list(map(_row, items))
    columns = [
        pa.array([row.get(field.name) for row in rows], type=field.type) for field in _SCHEMA
    ]
    with io.BytesIO() as sink:
        with pa.ipc.new_stream(sink, _SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        return sink.getvalue()


class ItemFile:
    """A file that blocks are appended to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)

    def __enter__(self) -> ItemFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._writer.close()
        self._file.close()

    def append(self, encoded: bytes) -> None:
        """Write what `encode` returned."""
        for batch in pa.ipc.open_stream(encoded):
            self._writer.write_batch(batch)


class MappedItems(Sequence[Item]):
    """The items of a file, which may be unlinked once this is there."""

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect_right(self._ends, place)
        start = self._ends[number - 1] if number else 0
        return _item(self._batches[number], place - start)


def _row(item: Item) -> dict[str, Any]:
    match item:
        case Sample():
            return {"token_ids": item.token_ids_T, "is_label": item.is_label_T}
        case Rating():
            return {**_row(item.sample), "is_liked": item.is_liked}
        case Pair():
            rejected = {f"rejected_{name}": value for name, value in _row(item.rejected).items()}
            return {**_row(item.chosen), **rejected}
        case Prompt():
            # As JSON has it, which may hold halves of a character.
            answer = None if item.answer is None else item.answer.encode(errors="surrogatepass")
            return {"token_ids": item.token_ids_T, "answer": answer}
    raise AssertionError(f"{type(item).__name__} is made after the data is prepared")


def _item(batch: pa.RecordBatch, row: int) -> Item:
    is_label, answer = batch["is_label"][row], batch["answer"][row].as_py()
    if not is_label.is_valid:
        text = None if answer is None else answer.decode(errors="surrogatepass")
        return Prompt(_tokens(batch["token_ids"][row]), text)
    sample = Sample(_tokens(batch["token_ids"][row]), _labels(is_label))
    if batch["rejected_token_ids"][row].is_valid:
        rejected = _tokens(batch["rejected_token_ids"][row])
        return Pair(sample, Sample(rejected, _labels(batch["rejected_is_label"][row])))
    is_liked = batch["is_liked"][row].as_py()
    return sample if is_liked is None else Rating(sample, is_liked)


def _tokens(scalar: Any) -> Any:
    # A copy: what is mapped is read-only, which torch does not know.
    return np.array(scalar.values.to_numpy(), dtype=np.int32)


def _labels(scalar: Any) -> Any:
    return np.array(scalar.values.to_numpy(zero_copy_only=False), dtype=np.bool_)
