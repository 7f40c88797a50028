"""How checkpoints spell our tensors: their names, and layouts that fuse or transpose them.

The decoder calls its tensors as LLaMA's checkpoints do. A family of files is a table that says how
it calls the same things; reading rows or columns of one of ours then reads only the bytes that
belong to them.
"""

# torch leaves some of its calls untyped.
# mypy: disable-error-code="no-any-return, no-untyped-call"

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mizzen.runtime.errors import WeightsMissingError
from mizzen.runtime.parallel.shard import Span

EMBEDDING = "model.embed_tokens.weight"
_OURS = re.compile(r"(?:model\.(?:layers\.(\d+)\.)?)?(.+)\.(weight|bias)")
_QKV = ("q_proj", "k_proj", "v_proj")


class WeightSource(Protocol):
    """A checkpoint that gives parts of its tensors by name."""

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows (first dimension) or columns (second)."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape; raises WeightsMissingError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NameMap:
    """A family's spelling. What a table does not list keeps its name."""

    root: str = "model."
    layer: str = "layers.{}."
    top: Mapping[str, str] = field(default_factory=dict)
    in_layer: Mapping[str, str] = field(default_factory=dict)
    # The tensor that holds queries, keys and values: all of each, or the three of each head.
    fused: str | None = None
    is_fused_by_head: bool = False
    transposed: tuple[str, ...] = ()  # theirs that are stored as [in, out]

    def theirs(self, name: str) -> str:
        """Return the checkpoint's name of one of our tensors."""
        found = _OURS.fullmatch(name)
        assert found is not None, name
        layer, path, kind = found.groups()
        if layer is None:
            if path == "lm_head":
                return f"{self.top.get(path, path)}.{kind}"
            return f"{self.root}{self.top.get(path, path)}.{kind}"
        path = self._fused_path(path) or self.in_layer.get(path, path)
        return f"{self.root}{self.layer.format(layer)}{path}.{kind}"

    def fused_index(self, name: str) -> int | None:
        """Return which third of a fused tensor ours is, or None."""
        path = name.rsplit(".", 2)[-2]
        return _QKV.index(path) if self.fused and path in _QKV else None

    def is_transposed(self, theirs: str) -> bool:
        """Is this one of the checkpoint's matrices stored as [in, out]?"""
        return theirs.endswith(".weight") and any(f".{t}." in theirs for t in self.transposed)

    def is_rearranged(self, name: str) -> bool:
        """Does the checkpoint hold one of our tensors in another order than we do?"""
        return self.fused_index(name) is not None or self.is_transposed(self.theirs(name))

    def _fused_path(self, path: str) -> str | None:
        return self.fused if path.removeprefix("self_attn.") in _QKV else None


class NamedSource:
    """A checkpoint, asked for our tensors."""

    def __init__(self, source: WeightSource, names: NameMap, *, head_dim: int) -> None:
        self._source = source
        self._names = names
        self._head_dim = head_dim
        self._cut = 0  # characters that this checkpoint leaves out before every name but the head's
        first = names.theirs(EMBEDDING)
        try:
            source.shape(first)
        except WeightsMissingError:
            # Saved without its head, a model loses the first part of its names.
            bare = first[first.index(".") + 1 :]
            try:
                source.shape(bare)
                self._cut = len(first) - len(bare)
            except WeightsMissingError:
                pass  # the loader will name the first tensor that it misses

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the whole tensor's shape; raises WeightsMissingError."""
        theirs = self._theirs(name)
        shape = self._source.shape(theirs)
        if self._names.is_transposed(theirs):
            shape = shape[::-1]
        return shape if self._names.fused_index(name) is None else (shape[0] // 3, *shape[1:])

    def read(self, name: str, *, rows: Span | None = None, columns: Span | None = None) -> Tensor:
        """Return the tensor, or only the named rows or columns."""
        theirs, part = self._theirs(name), self._names.fused_index(name)
        if part is None:
            return self._read(theirs, rows, columns)
        rows = rows or Span(0, self.shape(name)[0])
        if not self._names.is_fused_by_head:
            start = part * self.shape(name)[0] + rows.start
            return self._read(theirs, Span(start, rows.size), columns)
        values = self._read(theirs, Span(3 * rows.start, 3 * rows.size), columns)
        return values.unflatten(0, (-1, 3, self._head_dim))[:, part].flatten(0, 1)

    def _theirs(self, name: str) -> str:
        theirs = self._names.theirs(name)
        return theirs if name.startswith("lm_head") else theirs[self._cut :]

    def _read(self, theirs: str, rows: Span | None, columns: Span | None) -> Tensor:
        if self._names.is_transposed(theirs):
            return self._source.read(theirs, rows=columns, columns=rows).T
        return self._source.read(theirs, rows=rows, columns=columns)


def to_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], names: NameMap, *, head_dim: int
) -> dict[str, Tensor]:
    """Turn our whole tensors into the checkpoint's: what a `NamedSource` would read back.

    Those that are fused or transposed are copied, as soon as all of one's parts are there.
    """
    found: dict[str, Tensor] = {}
    waiting: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors:
        theirs, part = names.theirs(name), names.fused_index(name)
        if part is not None:
            thirds = waiting.setdefault(theirs, {})
            thirds[part] = tensor
            if len(thirds) < len(_QKV):
                continue
            del waiting[theirs]
            tensor = _fuse([thirds[i] for i in range(len(_QKV))], names, head_dim)
        found[theirs] = tensor.T.contiguous() if names.is_transposed(theirs) else tensor
    assert not waiting, f"parts of {sorted(waiting)} are missing"
    return found


def _fuse(thirds: list[Tensor], names: NameMap, head_dim: int) -> Tensor:
    if not names.is_fused_by_head:
        return torch.cat(thirds)
    by_head = [third.unflatten(0, (-1, head_dim)) for third in thirds]
    return torch.stack(by_head, dim=1).flatten(0, 2)
