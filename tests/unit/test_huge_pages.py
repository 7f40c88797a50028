"""Memory in large pages that many matrices share."""

import mmap
import re
from pathlib import Path

import psutil
import pytest
import torch

from mizzen.runtime.kernels import library
from mizzen.runtime.model.huge_pages import PAGE, HugePages
from mizzen.runtime.model.loader import load_decoder
from tests.fixtures.tiny_models import save_tiny_llama


def test_tensors_lie_apart_and_where_vectors_are_read() -> None:
    pages, made = HugePages(), []
    for index, numbers in enumerate((1, 7, 1000, 12 * PAGE, 3, PAGE, 9 * PAGE, 5 * PAGE)):
        tensor = pages.empty((numbers, 2), torch.bfloat16)
        made.append(tensor.fill_(index))
        assert tensor.shape == (numbers, 2)
        assert tensor.data_ptr() % 64 == 0
    assert all((tensor == index).all() for index, tensor in enumerate(made))


def held() -> int:
    return psutil.Process().memory_info().rss


def test_memory_is_given_back_with_the_last_tensor_in_it() -> None:
    pages, before = HugePages(), held()
    tensors = [pages.empty((64, 1 << 20), torch.int8).fill_(1) for _ in range(2)]
    assert held() - before > 100 << 20
    del tensors
    assert held() - before < 40 << 20
    assert (pages.empty((3,), torch.int8).fill_(1) == 1).all()


def test_what_begins_anew_does_not_keep_what_was_there_before() -> None:
    pages, before = HugePages(), held()
    old = pages.empty((60, 1 << 20), torch.int8).fill_(1)
    pages.begin_anew()
    new = pages.empty((3,), torch.int8).fill_(2)
    assert held() - before > 50 << 20
    del old
    assert held() - before < 30 << 20
    assert (new == 2).all()


@pytest.mark.skipif(not library.has_linear(), reason="this processor has no panels")
def test_each_model_has_pieces_of_its_own(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    models, at = [], []
    for _ in range(2):
        model = load_decoder(tmp_path, quantization="int8", dtype="bfloat16")
        models.append(model)
        at.append(model.blocks[0].attention.qkv.panels.describe(None).weight)
    assert abs(at[1] - at[0]) > PAGE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has none")
def test_a_kernel_without_large_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)  # an advice that is none: EINVAL, as there
    assert (HugePages().empty((3,), torch.int8).fill_(1) == 1).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has none")
def test_the_system_is_asked_for_large_pages() -> None:
    small = HugePages().empty((4,), torch.float32)
    maps = re.findall(
        r"^(\w+)-(\w+) .*?VmFlags:([^\n]*)", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    [flags] = [f for first, end, f in maps if int(first, 16) <= small.data_ptr() < int(end, 16)]
    assert "hg" in flags.split()
