"""Which models backend Transformers takes, and what it says of the others."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.errors import (
    BadModelError,
    NotAModelError,
    RemoteCodeRefusedError,
    UnknownArchitectureError,
    WeightsMissingError,
)
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.train.config import Suite, TrainConfig
from mizzen.runtime.train.errors import BackendMissingError, JobConfigError
from mizzen.runtime.train.hugging_face.gate import HuggingFaceSubject, LossExam, ServedExam
from mizzen.runtime.train.hugging_face.installed import check_installed
from mizzen.runtime.train.hugging_face.model import (
    load_model,
    max_len,
    read_config,
    round_for_publishing,
    write_model,
)
from mizzen.runtime.train.hugging_face.served import serve_base, serve_candidate
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.suites.exam import MethodExam
from mizzen.runtime.train.surroundings import Surroundings
from tests.fixtures.tiny_models import save_tiny_gpt_neox

CPU = torch.device("cpu")


def job(base: Path, **overrides: Any) -> TrainConfig:
    document = {
        "job": "test/job",
        "backend": "Transformers",
        "base_model": str(base),
        "datasets": [{"name": "a", "path": "/a.jsonl"}],
        "hyperparameters": {"dtype": "float32"},
        "checkpoint": {"directory": "/c"},
        "output": {"directory": "/o"},
    }
    return TrainConfig.model_validate(document | overrides)


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_models_context_is_read_from_its_configuration(tmp_path: Path) -> None:
    assert max_len(read_config(save_tiny_gpt_neox(tmp_path))) == 128


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "code from the model's directory": (
        {"model_type": "homemade", "auto_map": {"AutoConfig": "evil.Config"}},
        RemoteCodeRefusedError,
        "needs code from the model's directory",
    ),
    "a type nobody knows": (
        {"model_type": "homemade"},
        UnknownArchitectureError,
        "does not know model type 'homemade' either",
    ),
    "a model that does not write": (
        {"model_type": "t5"},
        UnknownArchitectureError,
        "Models of type t5 do not write text token by token. Use a causal language model.",
    ),
    "weights in few bits": (
        {"quantization_config": {"quant_method": "gptq"}},
        JobConfigError,
        "Use the model they were made from, or backend Mizzen.",
    ),
}


@pytest.mark.parametrize(("fields", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses(tmp_path: Path, fields: dict[str, Any], error: type[Exception], text: str) -> None:
    change_config(save_tiny_gpt_neox(tmp_path), **fields)
    with pytest.raises(error, match=text):
        read_config(tmp_path)


def test_refuses_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    with pytest.raises(NotAModelError, match=r"Use the model's safetensors, or backend Mizzen\."):
        read_config(path)


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    weights = load_file(save_tiny_gpt_neox(tmp_path) / "model.safetensors")
    del weights["gpt_neox.final_layer_norm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsMissingError, match=r"lacks 1 tensors, such as .*norm\.bias"):
        load_model(job(tmp_path), tmp_path, CPU)


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, damage: str) -> None:
    weights = save_tiny_gpt_neox(tmp_path) / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if damage == "cut short":
        weights.write_bytes(content[:-100])
    with pytest.raises(BadModelError, match=r"cannot be read: .*Copy the model again\."):
        load_model(job(tmp_path), tmp_path, CPU)


def test_an_adapters_files_are_the_same_each_time_they_are_written(tmp_path: Path) -> None:
    base = save_tiny_gpt_neox(tmp_path / "base")
    model = load_model(job(base), base, CPU)
    write_model(model, tmp_path, checkpoint=base)
    rules = json.loads((tmp_path / "adapter_config.json").read_text())
    assert rules["target_modules"] == sorted(rules["target_modules"])
    assert rules["base_model_name_or_path"] == str(base)


def test_a_whole_model_is_published_in_its_bases_type_with_its_bases_files(tmp_path: Path) -> None:
    base, published = save_tiny_gpt_neox(tmp_path / "base"), tmp_path / "published"
    change_config(base, dtype="float16")
    full = {"adaptation": {"type": "full"}, "output": {"directory": "/o", "kind": "model"}}
    model = load_model(job(base, **full), base, CPU)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    round_for_publishing(model, checkpoint=base)
    rounded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_model(model, published, checkpoint=base)
    written = load_file(published / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    read = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in read.items())
    assert json.loads((published / "config.json").read_text())["dtype"] == "bfloat16"
    assert (published / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@torch.no_grad()
def test_what_a_replica_would_compute_is_what_was_trained(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    config = job(base, checkpoint={"directory": str(tmp_path)})
    model = load_model(config, base, CPU)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.1)
    around = Surroundings(
        config=config,
        spec=ArchSpec.from_dir(base),
        tokenizer=Tokenizer.load(base),
        device=CPU,
        stop=StopFlag(),
    )
    subject = HuggingFaceSubject(
        model=model,
        precision=nullcontext,
        serve=lambda: serve_candidate(around, model, checkpoint=base),
    )
    samples, suite = [Sample(np.arange(20, dtype=np.int32), np.arange(20) > 0)], Suite(name="a")
    trained = LossExam(suite, samples).count(subject, slice(1), None)
    exam = MethodExam(suite, Sft(), samples)
    served = ServedExam(exam).count(subject, slice(1), None)
    assert (served.total, served.weight) == pytest.approx((trained.total, 19), rel=1e-4)
    assert exam.count(serve_base(around), slice(1), None).total != pytest.approx(trained.total)
    assert not list(tmp_path.glob(".partial*"))


def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackendMissingError, match=r"needs peft\. .*pip install 'mizzen\[transf"):
        check_installed()
