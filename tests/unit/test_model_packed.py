"""Quantized weights: how far results may move, and what must not move them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.config import ServeConfig
from mizzen.runtime.engine.ranks import load_rank
from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.kernels import compile as compiling
from mizzen.runtime.kernels import library
from mizzen.runtime.model import beside as beside_module
from mizzen.runtime.model import packed as packed_module
from mizzen.runtime.model.beside import is_recoverable, multiply_beside
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Linear
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.packed import (
    Int4Weight,
    Int8Weight,
    OneDnnWeight,
    Quantization,
    RoundedInputs,
    pack,
)
from mizzen.runtime.model.panels import PanelWeight
from mizzen.runtime.parallel.group import RankGroup
from tests.fixtures.tiny_models import save_tiny_llama

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bound"), [("none", 0.005), ("int8", 0.02), ("int4", 0.09)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_products_stay_close(
    kind: Quantization, bound: float, tokens: int, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.arange(96).to(dtype)
    found = pack(WEIGHT.to(dtype), kind)(x, bias)
    assert found.dtype == dtype
    assert error(found.float() - bias.float(), x.float() @ WEIGHT.T) < bound * (
        1 if dtype == torch.float32 else 4  # bias and result are rounded to 8 bits as well
    )


def test_a_huge_token_does_not_blur_the_others() -> None:
    """A prompt's first token is such a one in most models."""
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    alone = pack(WEIGHT, "int8")(x[1:], None)
    beside = pack(WEIGHT, "int8")(torch.cat((1000 * x[:1], x[1:])), None)[1:]
    assert error(beside, alone) < 0.02


def test_a_matrix_of_zeros_stays_zero() -> None:
    for kind in (Int8Weight, Int4Weight):
        found = kind(torch.zeros(32, 32))(torch.ones(2, 32), None)
        torch.testing.assert_close(found, torch.zeros(2, 32), atol=1e-6, rtol=0)


def test_int4_keeps_weights_that_lie_on_its_grid() -> None:
    levels = torch.randint(16, (32, 64), generator=torch.Generator().manual_seed(3)).float()
    levels[:, ::32], levels[:, 1::32] = 0, 15
    weight = levels * 0.25 - 1
    found = Int4Weight(weight)(torch.eye(64), None).T
    torch.testing.assert_close(found, weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "bound"), [(Int8Weight, 0.01), (Int4Weight, 1e-5)])
def test_products_are_those_of_the_stored_weights(
    kind: type[Int8Weight] | type[Int4Weight], bound: float
) -> None:
    """int4 keeps its inputs, int8 rounds them to 8 bits (7 on a CPU without VNNI)."""
    packed = kind(WEIGHT)
    stored = packed(torch.eye(64), None).T
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    if kind is Int8Weight and not torch.cpu._is_vnni_supported():
        bound *= 2  # a bit less
    assert error(packed(x, None), x @ stored.T) < bound


@pytest.mark.parametrize("kind", [Int8Weight, Int4Weight])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(
    kind: type[Int8Weight] | type[Int4Weight], bad: float
) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    broken = x.clone()
    broken[1, 7] = bad
    packed = kind(WEIGHT)
    found = packed(broken, None)
    assert not found[1].isfinite().any()
    assert error(found[::2], packed(x, None)[::2]) < 0.02
    assert not packed(broken[1:2], None).isfinite().any()


@pytest.mark.parametrize(("rows", "columns"), [(32, 48), (24, 64)])
def test_int4_refuses_what_does_not_divide_into_groups(rows: int, columns: int) -> None:
    message = rf"{columns} inputs and {rows} outputs .* multiples of 32 and 16\. Set .* to int8"
    with pytest.raises(QuantizationUnsupportedError, match=message):
        pack(torch.randn(rows, columns), "int4")
    pack(torch.randn(rows, columns), "int8")


@pytest.fixture(params=["amx", "avx512bf16", "avx512", "avx2"])
def panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply panels by the matrix unit, then by each kind of vectors."""
    if not library.runs(request.param):
        pytest.skip(f"this processor has no {request.param}")
    loaded = library.load(compiling.library_path(request.param))
    monkeypatch.setattr(library, "kernels", lambda: loaded)


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 32, 33, 70])
@pytest.mark.parametrize("has_8_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_panels_multiply_as_the_stored_weights(
    tokens: int, threads: int, has_8_bits: bool, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(6)
    weight = WEIGHT.bfloat16()
    assert PanelWeight.suits(weight), "no kernels: `python -m mizzen.runtime.kernels.compile`"
    packed = PanelWeight(weight, has_8_bits=has_8_bits)
    stored = packed(torch.eye(64).bfloat16(), None, dtype=torch.float32).T
    assert error(stored, weight.float()) < (0.01 if has_8_bits else 1e-6)
    x, bias, residual = (
        torch.randn(shape, generator=random).bfloat16()
        for shape in ((tokens, 64), 96, (tokens, 96))
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = packed(x, bias, residual, dtype=dtype)
    torch.set_num_threads(threads_before)
    expected = x.float() @ stored.T + bias.float() + residual.float()
    # Sums are float32; the stored weights were read through a rounding of their scale only.
    assert found.dtype == dtype
    assert error(found.float(), expected) < (1e-6 if dtype == torch.float32 else 0.003)


@pytest.mark.usefixtures("panels")
def test_a_token_that_is_not_finite_spoils_itself_alone_in_panels() -> None:
    x = torch.ones(40, 64).bfloat16()
    x[3, 5], x[20, 0] = torch.nan, torch.inf
    for has_8_bits in (False, True):
        found = PanelWeight(WEIGHT.bfloat16(), has_8_bits=has_8_bits)(x, None)
        is_bad = ~found.isfinite().any(-1)
        assert is_bad.nonzero()[:, 0].tolist() == [3, 20]


@pytest.mark.parametrize("level", ["avx512bf16", "avx512", "avx2"])
def test_a_token_gets_the_same_products_whoever_is_beside_it(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library.runs(level):
        pytest.skip(f"this processor has no {level}")
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    vectors = library.load(compiling.library_path(level))
    monkeypatch.setattr(library, "kernels", lambda: vectors)
    for has_8_bits in (False, True):
        packed = PanelWeight(WEIGHT.bfloat16(), has_8_bits=has_8_bits)
        together = packed(x, None)
        for count in range(1, 14):
            assert torch.equal(packed(x[:count], None), together[:count]), count


knows_bfloat16 = pytest.mark.skipif(
    not OneDnnWeight.suits(torch.bfloat16), reason="oneDNN knows no bfloat16 on this processor"
)


def no_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = library.load(compiling.library_path("plain"))
    monkeypatch.setattr(library, "kernels", lambda: plain)


@knows_bfloat16
def test_what_does_not_divide_into_panels_is_packed_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for shape in ((48, 64), (64, 48)):
        assert isinstance(pack(torch.randn(shape).bfloat16(), "none"), OneDnnWeight)
    no_panels(monkeypatch)
    assert isinstance(pack(WEIGHT.bfloat16(), "none"), OneDnnWeight), "no panels"


def test_other_types_are_packed_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(pack(WEIGHT, "none"), OneDnnWeight), "float32"
    no_panels(monkeypatch)
    assert isinstance(pack(WEIGHT.bfloat16(), "int8"), Int8Weight)


def test_inputs_keep_16_bits_where_8_cannot_be_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_module, "_multiplies_8_bits", lambda: False)
    if not library.has_linear():
        pytest.skip("no panels on this processor")
    packed = pack(WEIGHT, "int8")
    assert isinstance(packed, RoundedInputs)
    stored = packed(torch.eye(64), None).T
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(4))
    bias = torch.arange(96.0)
    assert error(packed(x, bias) - bias, x @ stored.T) < 0.003
    assert isinstance(pack(torch.randn(48, 64), "int8"), Int8Weight), "not whole panels"


def test_bfloat16_stays_as_it_is_where_nothing_multiplies_it_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor with AVX2 alone: oneDNN refuses the type there, and ended the engine."""
    monkeypatch.setattr(packed_module, "knows_bfloat16", lambda: False)
    for shape in ((48, 64), (64, 48)):
        assert pack(torch.randn(shape).bfloat16(), "none") is None
    no_panels(monkeypatch)
    assert pack(WEIGHT.bfloat16(), "none") is None
    save_tiny_llama(tmp_path)
    decoder, plain = (load_decoder(tmp_path, dtype=torch.bfloat16) for _ in range(2))
    assert not decoder.prepack()
    assert torch.equal(logits(decoder), logits(plain))
    mixed = load_decoder(tmp_path, dtype=torch.bfloat16, quantization="int8")
    assert error(logits(mixed), logits(plain)) < 0.2


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    hidden = decoder(torch.arange(3, 43), torch.arange(40), CausalAttention([40]))
    return decoder.logits(hidden)


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.05), ("int4", 0.5)])
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "own head"])
def test_a_quantized_model_is_close_to_the_model(
    tmp_path: Path, kind: Quantization, bound: float, is_tied: bool
) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=is_tied, mlp_bias=True, hidden_size=64)
    plain = logits(load_decoder(tmp_path, dtype="float32"))
    decoder = load_decoder(tmp_path, dtype="float32", quantization=kind)
    found = logits(decoder)
    assert 0 < error(found, plain) < bound
    decoder.prepack()
    assert torch.equal(logits(decoder), found), "what is quantized is not packed again"
    held = sum(parameter.nbytes for parameter in decoder.parameters())
    table = decoder.embedding.weight.nbytes
    assert table < held < 1.1 * table, "of the matrices only the table of token vectors is kept"


def test_a_rank_whose_part_does_not_divide_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)  # 96 inner units are three groups, and half of them is none
    load_decoder(tmp_path, quantization="int4")
    with pytest.raises(QuantizationUnsupportedError, match="48 inputs"):
        load_decoder(tmp_path, quantization="int4", group=RankGroup(1, 2))


def test_fp8_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(
        QuantizationUnsupportedError, match=r"needs a GPU.*Set it to int8"
    ) as raised:
        load_decoder(tmp_path, quantization="fp8")
    assert raised.value.reason == "QuantizationUnsupported"


@pytest.mark.parametrize(
    ("kind", "form"),
    [("int8", (Int8Weight, PanelWeight, RoundedInputs)), ("int4", (Int4Weight,))],
)
def test_the_flag_reaches_the_weights(
    tmp_path: Path, kind: Quantization, form: tuple[type, ...]
) -> None:
    save_tiny_llama(tmp_path)
    config = ServeConfig(model=str(tmp_path), quantization=kind).engine_config()
    decoder = load_rank(config, torch.device("cpu"), RankGroup())
    packed = [part._packed for part in decoder.modules() if isinstance(part, Linear)]
    assert sum(isinstance(weight, form) for weight in packed) >= 8, "four in each of two layers"
    assert not any(isinstance(weight, OneDnnWeight) for weight in packed)


def test_rows_of_panels_are_those_of_the_matrix() -> None:
    matrix = WEIGHT.to(torch.bfloat16)
    at = torch.tensor([0, 95, 31, 32, 16, 16])
    assert torch.equal(PanelWeight(matrix, has_8_bits=False).rows(at), matrix[at])


def test_a_tied_table_is_held_once_where_its_panels_give_rows(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=True, vocab_size=256, hidden_size=64)
    decoder = load_decoder(tmp_path, dtype=torch.bfloat16)
    tokens = torch.tensor([3, 200, 77])
    before = decoder.embedding.embed(tokens)
    decoder.prepack()
    assert torch.equal(decoder.embedding.embed(tokens), before)
    is_panels = isinstance(decoder.embedding._packed, PanelWeight)
    assert (decoder.embedding.weight.numel() == 0) == is_panels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_a_packed_weight_as_they_pass_the_plain_one(dtype: torch.dtype) -> None:
    """The first form is ours where there is one, the second oneDNN's."""
    bias = torch.arange(96).to(dtype)
    forms = [pack(WEIGHT.to(dtype), "none")]
    if OneDnnWeight.suits(dtype):
        forms.append(OneDnnWeight(WEIGHT.to(dtype)))
    for packed in forms:
        plain, beside = (
            torch.randn(9, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
            for _ in range(2)
        )
        expected = torch.nn.functional.linear(plain.requires_grad_(True), WEIGHT.to(dtype), bias)
        assert is_recoverable(packed)
        found = multiply_beside(beside.requires_grad_(True), bias, packed)
        for out in (expected, found):
            out.float().square().sum().backward()
        assert plain.grad is not None
        assert beside.grad is not None
        assert error(beside.grad, plain.grad) < (1e-5 if dtype == torch.float32 else 0.02)


def test_gradients_are_multiplied_in_float32_where_bfloat16_has_no_instruction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = pack(WEIGHT.bfloat16(), "none")
    assert is_recoverable(packed)
    monkeypatch.setattr(beside_module, "knows_bfloat16", lambda: False)
    monkeypatch.setattr(beside_module, "_BLOCK", 40)  # the last one is smaller
    generator = torch.Generator().manual_seed(3)
    learned = torch.randn(9, 64, generator=generator).bfloat16().requires_grad_(True)
    gradient = torch.randn(9, 96, generator=generator).bfloat16()
    multiply_beside(learned, None, packed).backward(gradient)
    assert learned.grad is not None
    assert error(learned.grad.float(), gradient.float() @ WEIGHT.bfloat16().float()) < 0.005


def test_panels_give_the_whole_weight_back_as_it_was() -> None:
    matrix = WEIGHT.to(torch.bfloat16)
    assert torch.equal(PanelWeight(matrix, has_8_bits=False).recover(), matrix)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nothing_learns_beside_a_model_of_few_bits(tmp_path: Path, kind: Quantization) -> None:
    save_tiny_llama(tmp_path)
    assert load_decoder(tmp_path).lets_gradients_through
    assert not load_decoder(tmp_path, quantization=kind).lets_gradients_through
    assert load_decoder(tmp_path, quantization=kind, is_trained_beside=True).lets_gradients_through
