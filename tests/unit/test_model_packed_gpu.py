"""Quantized weights as a GPU multiplies them. Kernels are interpreted, fp8 is torch's on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model import layers
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.packed import Int4Weight, PackedWeight, Quantization, check_fp8
from mizzen.runtime.model.packed_gpu import (
    Fp8Weight,
    GpuInt4Weight,
    GpuInt8Weight,
    _multiply_kernel,
    pack_on_gpu,
)
from tests.fixtures.rank_work import paged_logits
from tests.fixtures.tiny_models import save_tiny_llama

# Neither width is a multiple of the kernel's tiles.
WEIGHT = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
# A row's largest of some 160 numbers is 3 times their size: int8 rounds to steps of 3/127, an error
# of 3/127/sqrt(12). fp8 keeps 3 digits after the first, of inputs too: errors of 2^-4/sqrt(3) each.
BOUNDS: dict[Quantization, float] = {"int8": 0.01, "int4": 0.09, "fp8": 0.06}
FEW_AND_MANY = [1, 3, 21, 70]


def inputs(tokens: int) -> Tensor:
    return torch.randn(tokens, WEIGHT.shape[1], generator=torch.Generator().manual_seed(1))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_the_kernel_is_interpreted() -> None:
    assert type(_multiply_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("tokens", FEW_AND_MANY)
def test_products_stay_close(kind: Quantization, tokens: int) -> None:
    x, bias = inputs(tokens), torch.arange(48.0)
    found = pack_on_gpu(WEIGHT, kind)(x, bias)
    assert found.shape == (tokens, 48) and found.dtype == torch.float32
    assert error(found - bias, F.linear(x, WEIGHT)) < BOUNDS[kind]
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("kind", [GpuInt8Weight, GpuInt4Weight])
@pytest.mark.parametrize("tokens", FEW_AND_MANY)
def test_few_and_many_tokens_are_multiplied_by_the_stored_weights(
    kind: type[GpuInt8Weight] | type[GpuInt4Weight], tokens: int
) -> None:
    packed, x = kind(WEIGHT), inputs(tokens)
    expected = F.linear(x, packed.whole(torch.float32))
    torch.testing.assert_close(packed(x, None), expected, atol=1e-4, rtol=1e-4)


def test_half_precision_stays_half() -> None:
    # The interpreter multiplies bfloat16 as if it were integers, so float16 stands in.
    for kind in (GpuInt8Weight, GpuInt4Weight):
        packed, x = kind(WEIGHT.half()), inputs(5).half()
        found = packed(x, None)
        assert found.dtype == torch.float16
        assert error(found, F.linear(x.float(), packed.whole(torch.float32))) < 0.002


def test_int4_stores_what_it_stores_on_a_cpu() -> None:
    eye = torch.eye(160)
    on_cpu = Int4Weight(WEIGHT)(eye, None).T
    torch.testing.assert_close(GpuInt4Weight(WEIGHT).whole(torch.float32), on_cpu)


def test_fp8_gives_each_token_a_scale_of_its_own() -> None:
    """A prompt's first token has inputs a thousand times the others' in most models."""
    packed, x = Fp8Weight(WEIGHT), inputs(4)
    beside = packed(torch.cat((1000 * x[:1], x[1:])), None)[1:]
    torch.testing.assert_close(beside, packed(x[1:], None))


@pytest.mark.parametrize("kind", BOUNDS)
def test_zeros_stay_zeros(kind: Quantization) -> None:
    found = pack_on_gpu(torch.zeros(32, 32), kind)(torch.ones(2, 32), None)
    torch.testing.assert_close(found, torch.zeros(2, 32), atol=1e-6, rtol=0)


def test_a_whole_model_computes_with_the_stored_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_tiny_llama(tmp_path)
    kinds: list[str] = []

    def pack(weight_OI: Tensor, quantization: Quantization) -> PackedWeight:
        kinds.append(quantization)
        return pack_on_gpu(weight_OI, quantization)

    def restore(weight_OI: Tensor, quantization: Quantization) -> PackedWeight:
        stored = pack_on_gpu(weight_OI, quantization)
        assert isinstance(stored, GpuInt8Weight | GpuInt4Weight)
        return lambda x, bias: F.linear(x, stored.whole(x.dtype), bias)

    found = logits_packed_by(pack, monkeypatch, tmp_path, "int4")
    expected = logits_packed_by(restore, monkeypatch, tmp_path, "int4")
    assert kinds == ["int4"] * 8 + ["int8"], "the head keeps 8 digits"
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_a_whole_model_in_fp8_stays_close(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    expected = paged_logits(load_decoder(tmp_path, dtype="float32"), [2, 1])
    found = logits_packed_by(pack_on_gpu, monkeypatch, tmp_path, "fp8")
    assert error(found, expected) < 0.2


def logits_packed_by(
    pack: Callable[[Tensor, Quantization], PackedWeight],
    monkeypatch: pytest.MonkeyPatch,
    path: Path,
    kind: Quantization,
) -> Tensor:
    """Return three tokens' logits of a model whose weights were packed so on a CPU."""
    monkeypatch.setattr(layers, "pack", pack)
    monkeypatch.setattr("mizzen.runtime.model.loader.check_device", lambda *_: None)
    return paged_logits(load_decoder(path, dtype="float32", quantization=kind), [2, 1])


@pytest.mark.parametrize(
    ("kind", "shape", "needs"),
    [("int4", (32, 48), "inputs in multiples of 32"), ("fp8", (24, 32), "both in multiples of 16")],
)
def test_a_matrix_that_does_not_divide_is_refused(
    kind: Quantization, shape: tuple[int, int], needs: str
) -> None:
    with pytest.raises(
        QuantizationUnsupportedError, match=f"{needs}.*Set the quantization to int8"
    ):
        pack_on_gpu(torch.zeros(shape), kind)


def test_fp8_wants_a_gpu_that_multiplies_it() -> None:
    for capability in ((8, 9), (9, 0), (10, 3)):
        check_fp8(capability)
    for old in ((8, 0), (12, 0)):
        with pytest.raises(QuantizationUnsupportedError, match=f"this one has {old[0]}.{old[1]}"):
            check_fp8(old)
    with pytest.raises(QuantizationUnsupportedError, match="runs on a CPU"):
        check_fp8(None)
