"""Measured speed beside a device's best: known where the device is, absent where it is not."""

from pathlib import Path

import pytest
import torch

from hack.tiny_model import write_tiny_model
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.utilization import (
    find_peak_flops,
    flops_per_token,
    peak_tokens_per_second,
)
from tests.fixtures.tiny_models import save_tiny_llama

DEVICES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": None,
    "Some other device": None,
}


@pytest.mark.parametrize(("name", "flops"), DEVICES.items(), ids=DEVICES)
def test_the_peak_of(name: str, flops: float | None) -> None:
    assert find_peak_flops(name) == flops


def test_the_peak_of_a_cpu_is_unknown(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path))
    assert peak_tokens_per_second(decoder, dtype=torch.bfloat16, is_frozen=True, workers=1) is None


def test_six_operations_for_each_weight_that_learns_and_four_for_a_frozen_one(
    tmp_path: Path,
) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path, layers=2, width=64, heads=4, kv_heads=2))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    weights = 2 * layer + decoder.embedding.weight.numel()  # the table is the head as well
    assert flops_per_token(decoder, is_frozen=False) == 6 * weights
    assert flops_per_token(decoder, is_frozen=True) == 4 * weights


def test_weights_in_few_bits_count_like_others_and_a_table_that_is_only_read_does_not(
    tmp_path: Path,
) -> None:
    save_tiny_llama(tmp_path, tie_word_embeddings=False)
    whole = load_decoder(tmp_path)
    small = load_decoder(tmp_path, quantization="int8", is_trained_beside=True)
    matrices = sum(p.numel() for p in whole.parameters() if p.ndim == 2)
    found = flops_per_token(whole, is_frozen=True)
    assert found == 4 * (matrices - whole.embedding.weight.numel())
    assert found == flops_per_token(small, is_frozen=True)
