"""The front of a GGUF file: its metadata and where its tensors lie. Reads no weights.

The gguf package reads the same, but keeps every token of the vocabulary as an array of its own
and so needs seconds for what takes a tenth of one here.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mizzen.runtime.errors import NotAModelError, ShardTruncatedError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is as torch has it: outermost dimension first."""

    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int  # from the file's beginning

    @property
    def row_bytes(self) -> int:
        """Bytes of one innermost row; rows are quantized independently."""
        block_values, block_bytes = GGML_QUANT_SIZES[self.quantization]
        return self.shape[-1] // block_values * block_bytes

    @property
    def byte_count(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read metadata and tensor places of a little-endian GGUF file, and check its length.

    Raises:
        NotAModelError: it is no GGUF file, or a part of a split one.
        ShardTruncatedError: it ends before its last tensor does.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise NotAModelError(f"{path.name} is not a GGUF file. Download it again.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _parse(data)
            except struct.error:
                raise _truncated(path) from None
            except (LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
                raise NotAModelError(f"{path.name} is no GGUF file we can read: {error}.") from None
            end = max((t.offset + t.byte_count for t in header.tensors.values()), default=0)
            if end > len(data):
                raise _truncated(path)
    if header.metadata.get("split.count", 0) > 1:
        raise NotAModelError(f"{path.name} is a part of a split model. Merge the parts into one.")
    return header


def _truncated(path: Path) -> ShardTruncatedError:
    return ShardTruncatedError(
        f"{path.name} is shorter than its header promises: a copy was cut short. Copy it again."
    )


def _parse(data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, offset=len(_MAGIC))
    if (version := cursor.scalar("I")) not in _VERSIONS:
        raise ValueError(f"version {version} is not one of {_VERSIONS}")
    tensor_count, entry_count = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("I")) for _ in range(entry_count)}
    places = [_place(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.offset // alignment) * alignment
    return GgufHeader(metadata, {n: GgufTensor(s, q, start + offset) for n, s, q, offset in places})


def _place(cursor: "_Cursor") -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """Read a tensor's name, shape, kind and offset from the start of the weights."""
    name = cursor.string()
    dimensions = cursor.scalar("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
    return name, shape, GGMLQuantizationType(cursor.scalar("I")), cursor.scalar("Q")


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap, *, offset: int) -> None:
        self._data = data
        self.offset = offset

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.offset)
        self.offset += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        size = self.scalar("Q")
        self.offset += size
        if self.offset > len(self._data):
            raise struct.error("string beyond the end")
        return self._data[self.offset - size : self.offset].decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item_kind, count = self.scalar("I"), self.scalar("Q")
        if item_kind in (_STRING, _ARRAY):
            return [self.value(item_kind) for _ in range(count)]
        layout = f"<{count}{_SCALARS[item_kind]}"
        values = struct.unpack_from(layout, self._data, self.offset)
        self.offset += struct.calcsize(layout)
        return list(values)
