"""The C kernels give what torch gives, at every level of instructions this processor has."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention import causal_cpu
from mizzen.runtime.attention.base import AttentionBias, KvShape, PagedBatch, alibi_slopes
from mizzen.runtime.attention.causal import CausalAttention, attend_causal
from mizzen.runtime.attention.paged_cpu import PagedCpu
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.attention.select import paged_attention
from mizzen.runtime.kernels import compile as compiling
from mizzen.runtime.kernels import library, ops

LEVELS = [level for level in compiling.levels() if library.runs(level)]
# A result in bfloat16 may be the next number; in float32 sums are added up in another order.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute with one level's kernels, without gradients."""
    loaded = library.load(compiling.library_path(request.param))
    monkeypatch.setattr(library, "kernels", lambda: loaded)
    with torch.inference_mode():
        yield request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=BOUNDS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(found: Tensor, expected: Tensor) -> None:
    bound = BOUNDS[found.dtype]
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 576), (3, 7), (2, 9, 64), (130, 577), (0, 64)], ids=str)
def test_rms_norm_is_torchs(
    level: str, threads: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    expected = F.rms_norm(x.float(), weight.shape, weight.float(), 1e-5).to(dtype)
    assert_close(ops.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_reads_heads_that_lie_apart(level: str) -> None:
    x, weight = random(4, 5, 16)[:, 1:3], random(16)
    assert_close(ops.rms_norm(x, weight, 1e-5), F.rms_norm(x, (16,), weight, 1e-5))


@pytest.mark.parametrize("shape", [(1, 768), (3, 7), (2, 9, 64), (130, 577), (0, 64)], ids=str)
def test_layer_norm_is_torchs(
    level: str, threads: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, weight, bias = (random(*shape) + 2).to(dtype), random(shape[-1]), random(shape[-1])
    weight, bias = weight.to(dtype), bias.flip(0).to(dtype)
    expected = F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), 1e-5)
    assert_close(ops.layer_norm(x, weight, bias, 1e-5), expected.to(dtype))


@pytest.mark.parametrize(("tokens", "width"), [(1, 3072), (3, 5), (70, 1537)])
def test_activations_are_torchs(
    level: str, threads: int, dtype: torch.dtype, tokens: int, width: int
) -> None:
    units = (random(tokens, width) * 20).to(dtype)
    units[0, :3] = torch.tensor([-1e4, 0.0, 1e4])
    expected = F.gelu(units.float(), approximate="tanh").to(dtype)
    assert_close(ops.relu(units.clone()), F.relu(units))
    assert_close(ops.gelu_tanh(units.clone()), expected)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 5), (70, 1537)])
def test_a_gate_is_torchs(
    level: str, threads: int, dtype: torch.dtype, tokens: int, width: int
) -> None:
    gate, up = random(tokens, 2 * width, dtype=dtype).split(width, dim=-1)
    expected = (F.silu(gate.float()) * up.float()).to(dtype)
    assert_close(ops.silu_gate(gate, up), expected)


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30])
def test_a_gate_saturates_as_torchs(level: str, value: float) -> None:
    gate = torch.full((2, 17), value)
    assert_close(ops.silu_gate(gate, torch.ones(2, 17)), F.silu(gate))


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 64, 80, 256])
def test_rotation_is_torchs(level: str, dtype: torch.dtype, dim: int, is_interleaved: bool) -> None:
    cos, sin = random(5, 1, dim, dtype=dtype), random(5, 1, dim, dtype=dtype).flip(0)
    packed = random(5, 12 * dim, dtype=dtype)
    q, _ = packed.split([9 * dim, 3 * dim], dim=-1)
    with torch.enable_grad():  # training: torch's own way
        expected = ops.rotate(
            q.float().view(5, 9, dim), cos.float(), sin.float(), is_interleaved=is_interleaved
        )
    untouched = packed[:, 9 * dim :].clone()
    found = ops.rotate(q.view(5, 9, dim), cos, sin, is_interleaved=is_interleaved)
    assert_close(found, expected.to(dtype))
    assert torch.equal(packed[:, 9 * dim :], untouched)


def batch_of(lens: list[tuple[int, int]], page: int) -> PagedBatch:
    """Sequences of so many queries and so much context, their pages scattered."""
    free = (torch.randperm(200, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    return PagedBatch.build(
        query_lens=[new for new, _ in lens],
        context_lens=[context for _, context in lens],
        block_tables=[[free.pop() for _ in range(-(-context // page))] for _, context in lens],
        block_tokens=page,
    )


BIASES = {
    "plain": lambda heads: AttentionBias(),
    "a window": lambda heads: AttentionBias(window=19),
    "slopes": lambda heads: AttentionBias(alibi_slopes(heads)),
}
CONTEXTS = [1, 128, 129, 17, 3, 64, 40, 1, 16, 90, 33, 2, 70, 5, 20, 8, 11]
LENS = {
    "decodes and prompts": [
        *[(1, 1), (1, 16), (1, 17), (5, 40)],
        *[(1, 130), (9, 9), (20, 50), (150, 290)],
    ],
    "decodes in a row": [(1, context) for context in CONTEXTS],
}


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("heads", "dim", "page"),
    [((9, 3), 64, 16), ((4, 4), 80, 16), ((6, 1), 128, 8), ((2, 1), 256, 4)],
)
def test_attention_over_pages_is_torchs(
    level: str,
    threads: int,
    dtype: torch.dtype,
    lens: str,
    bias: str,
    heads: tuple[int, int],
    dim: int,
    page: int,
) -> None:
    shape, batch = KvShape(2, 201, heads[1], dim, page), batch_of(LENS[lens], page)
    cache = random(*shape.allocate(dtype=dtype).shape, dtype=dtype)
    widths = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
    packed = random(len(batch.slots_T), sum(widths), dtype=dtype).split(widths, dim=-1)
    q, k, v = (x.view(len(x), -1, dim) for x in packed)
    added = BIASES[bias](heads[0])
    reference = cache.float()
    expected = PagedSdpa(reference, batch)(1, q.float(), k.float(), v.float(), bias=added)
    assert_close(PagedCpu(cache, batch)(1, q, k, v, bias=added), expected.to(dtype))
    assert torch.equal(cache, reference.to(dtype)), "the same keys and values are stored"


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_own_sequence(
    level: str, dtype: torch.dtype, bad: float, dim: int
) -> None:
    batch = batch_of([(1, 20), (1, 20), (1, 3), (5, 7)], 16)
    cache = KvShape(1, 201, 1, dim).allocate(dtype=dtype)
    # Beyond a sequence's end lies what an earlier one left; it must not even be multiplied by zero.
    for row, context in ((2, 3), (3, 7)):
        cache[:, :, batch.block_tables_SB[row, 0], context:] = torch.nan
    q, k, v = (random(8, 1, dim, dtype=dtype) for _ in range(3))
    q[0], k[0, 0, 0] = 1, bad
    out = PagedCpu(cache, batch)(0, q, k, v)
    assert not out[0].isfinite().any()
    assert out[1:].isfinite().all()
    x = torch.tensor([[1.0, bad], [1.0, 2.0]], dtype=dtype)
    found_by = (
        ops.rms_norm(x, x[1], 1e-5),
        ops.layer_norm(x, x[1], x[1], 1e-5),
        ops.silu_gate(x, x),
    )
    for found in found_by:
        assert not found[0, 1].isfinite()
        assert found[1].isfinite().all()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(
    ("heads", "dim"), [((9, 3), 64), ((4, 4), 20), ((6, 1), 16), ((2, 1), 256)]
)
@pytest.mark.parametrize("lens", [[130, 1, 48, 97], [7]], ids=str)
def test_attention_for_training_and_its_gradients_are_torchs(
    level: str, threads: int, lens: list[int], heads: tuple[int, int], dim: int, bias: str
) -> None:
    kinds = [heads[0], heads[1], heads[1], heads[0]]
    *inputs, given = (random(sum(lens), kind, dim) for kind in kinds)
    added = BIASES[bias](heads[0])
    assert causal_cpu.is_for(inputs[0])
    attends = CausalAttention(lens), partial(attend_by_torch, lens)
    with torch.inference_mode(mode=False), torch.enable_grad():
        both = []
        for attend in attends:
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = attend(0, *leaves, bias=added)
            both.append((out, *torch.autograd.grad(out, leaves, given.clone())))
    for found, expected in zip(*both, strict=True):
        assert_close(found, expected)
    assert_close(attends[0](0, *inputs, bias=added), both[0][0])


def attend_by_torch(lens: list[int], layer: int, *tensors: Tensor, bias: AttentionBias) -> Tensor:
    parts = (x.split(lens) for x in tensors)
    return torch.cat([attend_causal(*part, bias) for part in zip(*parts, strict=True)])


def test_training_and_other_types_are_torchs() -> None:
    cache = KvShape(1, 2, 1, 8).allocate(dtype=torch.float32)
    with torch.no_grad():
        assert ops.are_used(cache), "no kernels: `python -m mizzen.runtime.kernels.compile`"
        assert not ops.are_used(cache.double())
        assert isinstance(paged_attention(cache, batch_of([(1, 1)], 16)), PagedCpu)
    assert not ops.are_used(cache)
    x = random(3, 4).requires_grad_()
    y = ops.silu_gate(x, ops.rotate(ops.rms_norm(x, x[0], 1e-5)[:, None], x, x)[:, 0])
    y = ops.gelu_tanh(ops.layer_norm(ops.relu(y), x[0], x[1], 1e-5))
    y.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_without_kernels_torch_serves_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "levels", lambda: {"plain": ""})
    monkeypatch.setattr(library, "library_path", lambda level: Path("/nowhere"))
    library.kernels.cache_clear()
    try:
        with torch.no_grad():
            cache = KvShape(1, 2, 1, 8).allocate(dtype=torch.float32)
            for _ in range(2):
                attend = paged_attention(cache, batch_of([(1, 1)], 16))
                assert isinstance(attend, PagedSdpa)
                assert_close(ops.silu_gate(cache, cache), cache)
    finally:
        library.kernels.cache_clear()
    warnings = [r.getMessage() for r in caplog.records if "kernels are not compiled" in r.message]
    assert len(warnings) == 1
    assert "python -m mizzen.runtime.kernels.compile" in warnings[0]


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    """Its arguments lie elsewhere: it would read and write where it must not."""
    assert library.is_current(compiling.library_path("plain"))
    assert not library.is_current(tmp_path / "libmizzen-plain.so")
    texts = {"silent": "int rotate;", "smaller": "long argument_bytes(void) { return 8; }"}
    for name, text in texts.items():
        source, old = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        source.write_text(text)
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", old], check=True)
        assert not library.is_current(old)


def copy_of_the_sources(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for source in compiling.SOURCES.glob("*.[ch]"):
        (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(compiling, "SOURCES", folder)


def test_an_old_compiler_leaves_out_the_best_levels_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy_of_the_sources(monkeypatch, tmp_path)
    monkeypatch.setattr(compiling, "levels", lambda: {"best": "-march=of-tomorrow", "plain": ""})
    assert compiling.compile_all() == [tmp_path / "libmizzen-plain.so"]
    assert [path.name for path in tmp_path.glob("lib*")] == ["libmizzen-plain.so"]


@pytest.mark.parametrize(
    ("compiler", "says"), [("no-such-cc", "install one, or name yours in CC"), ("false", "failed")]
)
def test_a_compiler_that_does_not_work_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, says: str
) -> None:
    copy_of_the_sources(monkeypatch, tmp_path)
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(compiling.NoCompilerError, match=says):
        compiling.compile_all()


def test_compiling_needs_nothing_but_the_standard_library() -> None:
    """The build loads the file by its path, where neither torch nor this package is installed."""
    path = Path(compiling.__file__)
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
