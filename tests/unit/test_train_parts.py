"""Tensors written by any number of ranks are read by any other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mizzen.runtime.parallel.shard import even_span
from mizzen.runtime.train.errors import TensorsDifferError
from mizzen.runtime.train.parts import Part, Wanted, files_by_kind, read_tensors, write_tensors

ROWS = torch.arange(35.0).view(7, 5)
NORM = torch.arange(3.0)


def cut(rank: int, ranks: int, dim: int) -> tuple[Part, Tensor]:
    span = even_span(ROWS.shape[dim], rank=rank, size=ranks)
    start = (span.start, 0) if dim == 0 else (0, span.start)
    return Part(start, tuple(ROWS.shape)), ROWS.narrow(dim, span.start, span.size)


def write(folder: Path, *, ranks: int, dim: int) -> list[Path]:
    files: list[Path] = []
    for rank in range(ranks):
        part, tensor = cut(rank, ranks, dim)
        tensors = {"cut": tensor} | ({"norm": NORM} if rank == 0 else {})
        parts = {"cut": part} if ranks > 1 else {}
        files += write_tensors(folder, {"weights": tensors}, parts=parts, rank=rank, ranks=ranks)
    return files


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 3, 8])
def test_each_reader_gets_its_part(tmp_path: Path, writers: int, readers: int, dim: int) -> None:
    paths = write(tmp_path, ranks=writers, dim=dim)
    for rank in range(readers):
        part, expected = cut(rank, readers, dim)
        wanted = {"cut": Wanted(part, tuple(expected.shape))}
        found = dict(read_tensors(paths, wanted))
        assert torch.equal(found["cut"], expected)
        assert torch.equal(found["norm"], NORM)


def test_without_a_wish_tensors_are_read_whole(tmp_path: Path) -> None:
    found = dict(read_tensors(write(tmp_path, ranks=3, dim=1), {}))
    assert torch.equal(found["cut"], ROWS)


def test_a_tensor_of_another_whole_shape_is_refused(tmp_path: Path) -> None:
    wanted = {"cut": Wanted(Part((0, 0), (8, 5)), (4, 5))}
    with pytest.raises(TensorsDifferError, match="Restore the base model"):
        dict(read_tensors(write(tmp_path, ranks=2, dim=0), wanted))


def test_a_gap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorsDifferError, match="are not those of this base model"):
        dict(read_tensors(write(tmp_path, ranks=3, dim=0)[:2], {}))


def test_files_are_told_apart_by_kind(tmp_path: Path) -> None:
    first = ["exp_avg-00001-of-00002.safetensors", "exp_avg-00002-of-00002.safetensors"]
    other = ["exp_avg_sq.safetensors"]
    found = files_by_kind(tmp_path, [*other, *reversed(first), "rng.json"])
    assert {kind: [p.name for p in paths] for kind, paths in found.items()} == {
        "exp_avg": first,
        "exp_avg_sq": other,
    }
