"""Kernels with a gradient learn what torch's operators learn, at every level of instructions."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.kernels import compile as compiling
from mizzen.runtime.kernels import gradients, library, ops
from mizzen.runtime.model.arch import RopeSpec
from mizzen.runtime.model.rope import inverse_frequencies, rope_tables

LEVELS = [level for level in compiling.levels() if library.runs(level)]
# A result in bfloat16 may be the next number; in float32 sums are added up in another order.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SIZES = [(1, 32), (5, 7), (64, 48), (130, 577), (0, 64)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    loaded = library.load(compiling.library_path(request.param))
    monkeypatch.setattr(library, "kernels", lambda: loaded)
    return request.param


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(dtype)


def learned(compute: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return what is computed, and the gradient of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = compute(*leaves)
    out.backward(random(*out.shape, dtype=out.dtype, seed=1))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_learned_alike(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], *inputs: Tensor
) -> None:
    # torch rounds to bfloat16 after each operator, which is coarser than what is compared.
    exact = learned(torchs, *(x.float() for x in inputs))
    for found, expected in zip(learned(ours, *inputs), exact, strict=True):
        bound = BOUNDS[found.dtype]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(found.float(), expected, atol=bound * scale, rtol=bound)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_rms_norm(level: str, dtype: torch.dtype, size: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, weight = random(*size, dtype=dtype), random(size[1], dtype=dtype)
    assert_learned_alike(
        lambda x, weight: ops.rms_norm(x, weight, 1e-5),
        lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-5),
        x,
        weight,
    )
    torch.set_num_threads(before)


def test_rms_norm_of_a_frozen_weight_and_of_heads(level: str) -> None:
    x, weight = random(9, 3, 64, dtype=torch.float32), random(64, dtype=torch.float32)
    assert_learned_alike(
        lambda x: ops.rms_norm(x.transpose(0, 1), weight, 1e-5),
        lambda x: F.rms_norm(x.transpose(0, 1), weight.shape, weight, 1e-5),
        x,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_silu_gate(level: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    rows, width = size
    both = random(rows, 2 * width, dtype=dtype)

    def torchs(both_T2F: Tensor) -> Tensor:
        gate, up = both_T2F.split(width, dim=-1)
        return F.silu(gate) * up

    assert_learned_alike(lambda x: ops.silu_gate(*x.split(width, dim=-1)), torchs, both)


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["halves", "neighbours"])
def test_rotate(level: str, dtype: torch.dtype, is_interleaved: bool) -> None:
    rope = RopeSpec(dims=16 if is_interleaved else 32, is_interleaved=is_interleaved)
    at, speeds = torch.arange(7), inverse_frequencies(rope, 32)
    cos, sin = rope_tables(at, speeds, rope, head_dim=32, dtype=torch.float32)
    given = cos.to(dtype), sin.to(dtype)

    def torchs(x_THd: Tensor) -> Tensor:
        if is_interleaved:
            partners = x_THd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partners = x_THd.roll(16, dims=-1)
        return x_THd * cos + partners * sin

    heads = random(7, 3, 32, dtype=dtype)
    assert_learned_alike(
        lambda x: ops.rotate(x, *given, is_interleaved=is_interleaved), torchs, heads
    )


def test_an_input_is_left_as_it_was(level: str) -> None:
    x = random(5, 2, 32, dtype=torch.float32).requires_grad_()
    before = x.detach().clone()
    tables = random(5, 1, 32, dtype=torch.float32), random(5, 1, 32, dtype=torch.float32)
    ops.rotate(x, *tables)
    assert torch.equal(x, before)


def test_what_kernels_do_not_know_is_torchs(level: str) -> None:
    x = random(3, 8, dtype=torch.float32).requires_grad_()
    weight = random(8, dtype=torch.float32)
    assert gradients.are_used(x, weight)
    assert not gradients.are_used(x, weight.bfloat16())
    assert not gradients.are_used(x.double(), weight.double())
    assert not gradients.are_used(x.detach(), weight)
    with torch.no_grad():
        assert not gradients.are_used(x, weight)


def test_a_library_without_a_kernel_is_not_current(monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiling.library_path(LEVELS[0])
    assert library.is_current(path)
    monkeypatch.setitem(library._SIGNATURES, "not_yet_compiled", [])
    assert not library.is_current(path)
