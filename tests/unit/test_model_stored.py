"""Frozen weights in few bits: products and gradients are those of the numbers that are stored."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hack.tiny_model import write_tiny_model
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.errors import QuantizationUnsupportedError
from mizzen.runtime.model import stored
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraConfig, TrainableLora
from mizzen.runtime.model.packed import Quantization, pack
from mizzen.runtime.model.stored import StoredWeight, store

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
KINDS: list[Quantization] = ["int8", "int4"]


def whole(weight: StoredWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.cat([weight.rows(span, dtype) for span in weight.spans()])


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def set_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(stored, "_WHOLE_WEIGHTS", rows * WEIGHT.shape[1])


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.01), ("int4", 0.09)])
def test_what_is_stored_is_close_to_the_weight(kind: Quantization, bound: float) -> None:
    assert (whole(store(WEIGHT, kind)) - WEIGHT).norm() < bound * WEIGHT.norm()


def test_the_numbers_are_those_that_serving_multiplies_with() -> None:
    served = pack(WEIGHT, "int4")(torch.eye(64), None).T
    torch.testing.assert_close(whole(store(WEIGHT, "int4")), served, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [96, 32, 7], ids=["at once", "in thirds", "with a rest"])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_gradient_are_those_of_the_whole_matrix(
    kind: Quantization, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_at_once(monkeypatch, rows)
    weight, bias = store(WEIGHT, kind), torch.arange(96).to(dtype)
    x, reference = (inputs(9, 64, dtype=dtype).requires_grad_() for _ in range(2))
    out = weight(x, bias)
    expected = nn.functional.linear(reference, whole(weight, dtype), bias)
    slope = inputs(9, 96, dtype=dtype)
    out.backward(slope)
    expected.backward(slope)
    assert x.grad is not None and reference.grad is not None
    assert x.grad.dtype == out.dtype == dtype
    loose = {"rtol": 0.05, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(out, expected, **loose)
    torch.testing.assert_close(x.grad, reference.grad, **loose)


def test_no_more_of_the_matrix_is_whole_than_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    set_at_once(monkeypatch, 32)
    spans = list(store(WEIGHT, "int8").spans())
    assert [(span.start, span.stop) for span in spans] == [(0, 32), (32, 64), (64, 96)]


def test_nothing_is_kept_for_the_way_back() -> None:
    out = store(WEIGHT, "int4")(inputs(9, 64).requires_grad_(), None)
    assert out.grad_fn is not None
    assert not out.grad_fn.saved_tensors  # type: ignore[attr-defined]


def test_int4_refuses_what_does_not_divide_into_groups() -> None:
    with pytest.raises(QuantizationUnsupportedError) as caught:
        store(torch.ones(16, 40), "int4")
    assert str(caught.value) == (
        "A frozen matrix with 40 inputs and 16 outputs cannot be stored as int4 to train beside: "
        "int4 needs inputs in multiples of 32. Set adaptation.quantization to int8."
    )


def held_bytes(decoder: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*decoder.parameters(), *decoder.buffers()))


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.35), ("int4", 0.25)])
def test_a_model_needs_a_fraction_of_the_memory(
    tmp_path: Path, kind: Quantization, share: float
) -> None:
    path = write_tiny_model(tmp_path, layers=4)
    full = load_decoder(path, dtype=torch.float32)
    small = load_decoder(path, dtype=torch.float32, quantization=kind, is_trained_beside=True)
    table = full.embedding.weight.nbytes  # stays as it is
    assert held_bytes(small) - table < share * (held_bytes(full) - table)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapters_gradient_is_the_one_beside_the_same_numbers_in_full(
    tmp_path: Path, kind: Quantization
) -> None:
    path = write_tiny_model(tmp_path)
    small = load_decoder(path, dtype=torch.float32, quantization=kind, is_trained_beside=True)
    full = load_decoder(path, dtype=torch.float32)
    with torch.no_grad():
        for part, twin in zip(small.parts(), full.parts(), strict=True):
            if isinstance(kept := getattr(part, "_packed", None), StoredWeight):
                twin.weight.copy_(whole(kept))
    for ours, theirs in zip(gradients(small), gradients(full), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def gradients(decoder: Decoder) -> list[Tensor]:
    lora = TrainableLora(decoder, LoraConfig(rank=4, alpha=8.0), seed=0)
    with torch.no_grad():
        for matrix in lora.b.values():
            matrix.copy_(inputs(*matrix.shape) / 10)
    token_ids = torch.arange(20)
    hidden = decoder(token_ids, token_ids, CausalAttention([20]), lora)
    decoder.logits(hidden).log_softmax(-1)[:, 3].sum().backward()
    found = [matrix.grad for matrix in lora.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in found)
    return [grad for grad in found if grad is not None]
