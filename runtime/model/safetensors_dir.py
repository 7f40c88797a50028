"""A checkpoint directory with safetensors: one file, or shards named by an index."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mizzen.runtime.errors import (
    NotAModelError,
    ShardTruncatedError,
    WeightsMissingError,
)
from mizzen.runtime.model.arch import read_json
from mizzen.runtime.parallel.shard import Span

_INDEX = "model.safetensors.index.json"
_LENGTH_BYTES = 8  # a safetensors file begins with its header's length


class SafetensorsDir:
    """Gives tensors by name, reading only the rows or columns asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open_files: dict[str, Any] = {}
        for file in sorted(set(self._files.values())):
            check_whole(directory / file)

    @cached_property
    def _files(self) -> dict[str, str]:
        """Each tensor's file."""
        index = self._directory / _INDEX
        if index.exists():
            weight_map: dict[str, str] = read_json(index)["weight_map"]
            if any("/" in file or "\\" in file for file in weight_map.values()):
                raise NotAModelError(f"{_INDEX} names a file outside the model's directory.")
            return weight_map
        files = sorted(self._directory.glob("*.safetensors"))
        if not files:
            raise WeightsMissingError(
                f"{self._directory} has config.json but no .safetensors file. Copy the weights too."
            )
        if len(files) > 1 and any("-of-" in file.name for file in files):
            raise WeightsMissingError(
                f"{self._directory} has {len(files)} weight shards but no {_INDEX}. Copy it too."
            )
        return {name: file.name for file in files for name in _tensor_names(file)}

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows or columns."""
        part = self._slice(name)
        if rows is not None:
            part = part[rows.start : rows.stop]
        elif columns is not None:
            part = part[:, columns.start : columns.stop]
        else:
            part = part[:]
        return cast(Tensor, part)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name: str) -> Any:
        file = self._files.get(name)
        if file is None:
            raise WeightsMissingError(f"The checkpoint has no tensor {name}.")
        if file not in self._open_files:
            self._open_files[file] = _open(self._directory / file)
        try:
            return self._open_files[file].get_slice(name)
        except SafetensorError:
            raise WeightsMissingError(f"{file} has no tensor {name}, against {_INDEX}.") from None


def check_whole(file: Path) -> None:
    """Compare a file's size with what its header promises, before gigabytes are read.

    Raises:
        ShardTruncatedError: the file is shorter.
        WeightsMissingError: there is no such file.
    """
    if not file.exists():
        raise WeightsMissingError(f"Weight file {file.name} is missing. Copy it again.")
    size, promised = file.stat().st_size, _LENGTH_BYTES
    with file.open("rb") as stream:
        header_len = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        promised += header_len
        if size >= promised > _LENGTH_BYTES:
            promised += _data_len(file, stream.read(header_len))
    if size < promised or header_len == 0:
        raise ShardTruncatedError(
            f"{file.name} has {size} bytes and its header promises {promised}: a copy was cut "
            "short. Copy the file again."
        )


def _data_len(file: Path, header: bytes) -> int:
    try:
        entries = json.loads(header)
        return max(
            (int(e["data_offsets"][1]) for name, e in entries.items() if name != "__metadata__"),
            default=0,
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        raise NotAModelError(f"{file.name} is not a safetensors file: bad header.") from None


def _tensor_names(file: Path) -> list[str]:
    check_whole(file)
    with _open(file) as tensors:
        return list(tensors.keys())


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise NotAModelError(
            f"{file.name} is damaged, or not a safetensors file: {error}. Copy the file again."
        ) from None
