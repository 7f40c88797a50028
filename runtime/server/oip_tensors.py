"""Open Inference Protocol tensors: the few datatypes that text generation needs, as bytes."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mizzen.runtime.server.errors import invalid

Value = bytes | bool | int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor of one element or a few, flattened."""

    name: str
    datatype: str
    values: tuple[Value, ...]

    @property
    def shape(self) -> list[int]:
        """Its shape: always a vector."""
        return [len(self.values)]


def from_raw(name: str, datatype: str, raw: bytes) -> Tensor:
    """Return a tensor from its binary form.

    Raises:
        ApiError: the bytes do not form such a tensor.
    """
    match datatype:
        case "BYTES":
            return Tensor(name, datatype, tuple(_split_bytes(name, raw)))
        case "BOOL":
            return Tensor(name, datatype, tuple(bool(byte) for byte in raw))
    raise _unsupported(name, datatype)


def _split_bytes(name: str, raw: bytes) -> Iterator[bytes]:
    # Each element is preceded by its length, four bytes little-endian.
    at = 0
    while at < len(raw):
        if at + 4 > len(raw):
            raise invalid(name, f"{name}: a length of a BYTES element is cut short.")
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + size > len(raw):
            raise invalid(name, f"{name}: a BYTES element is shorter than its length says.")
        yield raw[at : at + size]
        at += size


def from_values(name: str, datatype: str, values: Sequence[object]) -> Tensor:
    """Return a tensor from JSON data or gRPC contents, nested lists flattened.

    Raises:
        ApiError: a value is not of the datatype.
    """
    flat = tuple(_flatten(values))
    match datatype:
        case "BYTES":
            return Tensor(name, datatype, tuple(_as_bytes(name, value) for value in flat))
        case "BOOL" if all(isinstance(value, bool | int) for value in flat):
            return Tensor(name, datatype, tuple(bool(value) for value in flat))
        case "BOOL":
            raise invalid(name, f"{name}: the data of a BOOL tensor are true and false.")
    raise _unsupported(name, datatype)


def _flatten(values: Sequence[object]) -> Iterator[object]:
    for value in values:
        if isinstance(value, list):
            yield from _flatten(value)
        else:
            yield value


def _as_bytes(name: str, value: object) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode()
    raise invalid(name, f"{name}: the data of a BYTES tensor are strings.")


def _unsupported(name: str, datatype: str) -> Exception:
    return invalid(name, f"{name}: datatype {datatype} is not taken here, only BYTES and BOOL.")


def to_raw(tensor: Tensor) -> bytes:
    """Return the tensor's binary form."""
    if tensor.datatype == "BYTES":
        parts = [bytes(value) for value in tensor.values if isinstance(value, bytes)]
        return b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return struct.pack(f"<{len(tensor.values)}I", *tensor.values)


def to_json(tensor: Tensor) -> list[object]:
    """Return the tensor's data as JSON has it."""
    return [
        value.decode(errors="replace") if isinstance(value, bytes) else value
        for value in tensor.values
    ]
