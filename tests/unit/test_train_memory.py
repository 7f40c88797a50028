"""A job that cannot fit is refused with its arithmetic, before it reads anything."""

from pathlib import Path

import pytest
import torch

from hack.tiny_model import write_tiny_model
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.adaptation import adapt, frozen_bits
from mizzen.runtime.train.config import load_config
from mizzen.runtime.train.errors import TrainingDoesNotFitError
from mizzen.runtime.train.memory import Need, check_fits, memory_limit, need_of, plan_need
from mizzen.runtime.train.trainable import full_views
from tests.fixtures.train_runs import run, write_job

CPU = torch.device("cpu")


def test_every_weight_that_moves_has_a_gradient_and_two_moments(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path / "model"), dtype=torch.float32)
    moving = {id(view.parameter): view.parameter for view in full_views(decoder)}.values()
    size = sum(parameter.nbytes for parameter in decoder.parameters())
    assert need_of(decoder.parameters(), moving) == Need(size, size, 2 * size)


def test_an_adapter_stands_beside_its_frozen_base() -> None:
    base, adapter = torch.zeros(1000, dtype=torch.bfloat16), torch.zeros(10)
    assert need_of([base], [adapter]) == Need(2000 + 40, 40, 80)


ADAPTATIONS = {
    "every weight": ({"type": "full"}, "model"),
    "an adapter": ({"type": "lora"}, "adapter"),
    "an adapter of a base in 8 bits": ({"type": "qlora", "quantization": "int8"}, "adapter"),
    "an adapter of a base in 4 bits": ({"type": "qlora", "quantization": "int4"}, "adapter"),
}


@pytest.mark.parametrize(("adaptation", "kind"), ADAPTATIONS.values(), ids=ADAPTATIONS)
def test_the_need_of_training_is_known_before_a_weight_is_read(
    tmp_path: Path, adaptation: dict[str, str], kind: str
) -> None:
    job = write_job(tmp_path, adaptation=adaptation, output={"kind": kind})
    config = load_config(job.config_path)
    decoder = load_decoder(
        config.base_model,
        dtype=torch.float32,
        quantization=frozen_bits(config),
        is_trained_beside=True,
    )
    moving = adapt(decoder, config, heads=(), dtype=torch.float32).trainable.parameters
    allocated = need_of((*decoder.parameters(), *decoder.buffers()), moving)
    assert plan_need(config, decoder.spec, CPU) == allocated


def test_a_job_that_cannot_fit_is_refused_before_its_data_is_looked_for(tmp_path: Path) -> None:
    missing = [{"name": "colours", "path": "/none.jsonl"}]
    job = write_job(
        tmp_path, adaptation={"type": "full"}, output={"kind": "model"}, datasets=missing
    )
    assert run(job, memory_bytes=1 << 20) == 42
    assert job.last_word["reason"] == "TrainingDoesNotFit"
    assert "the trainer has 1 MiB" in job.last_word["message"]


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    need = Need(weights=512 << 20, gradients=512 << 20, moments=1024 << 20)
    check_fits(need, 2048 << 20)
    with pytest.raises(TrainingDoesNotFitError) as caught:
        check_fits(need, 2047 << 20)
    assert str(caught.value) == (
        "Training needs 512 MiB for weights + 512 MiB for gradients + 1024 MiB for the optimizer "
        "= 2048 MiB before the first sample, and the trainer has 2047 MiB. Use adaptation.type "
        "lora or qlora, a smaller base model, or more memory."
    )


def test_the_limit_is_the_pods_where_it_has_one(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    host = memory_limit(CPU, limit)
    assert host > 0
    limit.write_text("1048576\n")
    assert memory_limit(CPU, limit) == 1 << 20
    for without in ("max\n", "odd"):
        limit.write_text(without)
        assert memory_limit(CPU, limit) == host
