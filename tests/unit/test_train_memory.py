"""A job that cannot fit is refused with its arithmetic, before it reads anything."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BloomConfig, GPT2Config, OPTConfig, PretrainedConfig

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec, RopeSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora.files import CONFIG_FILE
from mizzen.runtime.train import export as export_module
from mizzen.runtime.train.adaptation import adapt, frozen_bits
from mizzen.runtime.train.compress import candidate as candidate_module
from mizzen.runtime.train.compress.need import ComputingNeed, plan_computing
from mizzen.runtime.train.compress.prune import prune
from mizzen.runtime.train.compress.quantize import quantize
from mizzen.runtime.train.config import TrainConfig, load_config
from mizzen.runtime.train.errors import (
    ComputingDoesNotFitError,
    JobConfigError,
    TrainingDoesNotFitError,
)
from mizzen.runtime.train.export import write_model
from mizzen.runtime.train.memory import (
    Need,
    check_computing_fits,
    check_fits,
    memory_limit,
    need_of,
    plan_need,
)
from mizzen.runtime.train.methods.reward import HEAD_FILE, HEAD_NAME
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.trainable import full_views
from tests.fixtures.tiny_models import make_model, save_tiny_tokenizer
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


FULL = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}
LORA = {"adaptation": {"type": "lora"}, "output": {"kind": "adapter"}}
REFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "a copy of the base beside weights that all move": (FULL, {}, 2),
    "the base itself behind an adapter": (LORA, {}, 1),
    "one of two copies where others play the roles in its pod": (LORA, {"roles": "Ray"}, 3),
    "in another pod where there are several": (FULL, {"roles": "Ray", "workers": 2}, 1),
}


@pytest.mark.parametrize(("adapted", "cast", "models"), REFERENCES.values(), ids=REFERENCES)
def test_the_reference_of_a_policy_is(
    tmp_path: Path, adapted: dict[str, Any], cast: dict[str, Any], models: int
) -> None:
    rl = {"rewards": [{"type": "length", "tokens": 4}]}
    both = {**adapted, "evaluation": {"suites": []}}
    alone, policy = (
        load_config(write_job(tmp_path / method, method=method, **both, **more).config_path)
        for method, more in (("sft", {}), ("grpo", {"rl": rl, **cast}))
    )
    spec = ArchSpec.from_dir(alone.base_model)
    base = sum(
        tensor.nbytes for tensor in load_decoder(alone.base_model, dtype=torch.float32).parameters()
    )
    more = plan_need(policy, spec, CPU).total - plan_need(alone, spec, CPU).total
    assert more == (models - 1) * base


def write_reward_model(folder: Path, base: Path | None, **sizes: int) -> Path:
    """Write a reward model as far as a plan reads it: an adapter of `base`, or a whole one."""
    if base is None:
        write_tiny_model(folder, **sizes)
    else:
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": str(base)}))
    save_file({HEAD_NAME: torch.zeros(1, 64)}, folder / HEAD_FILE)
    return folder


JUDGES: dict[str, tuple[bool, dict[str, Any], int, int]] = {
    "is a model of its own": (False, {}, 0, 1),
    "is the reference behind an adapter": (True, {}, 0, 0),
    "is a model of its own in the same pod": (False, {"roles": "Ray"}, 0, 1),
    "is a copy of the base behind an adapter in the same pod": (True, {"roles": "Ray"}, 1, 0),
    "is in another pod where there are several": (False, {"roles": "Ray", "workers": 2}, 0, 0),
}


@pytest.mark.parametrize(("is_adapter", "cast", "bases", "judges"), JUDGES.values(), ids=JUDGES)
def test_what_judges_a_policy_s_answers(
    tmp_path: Path, is_adapter: bool, cast: dict[str, Any], bases: int, judges: int
) -> None:
    rewards = [{"type": "length", "tokens": 4}]
    policy = {**FULL, **cast, "method": "grpo", "evaluation": {"suites": []}}
    job = write_job(tmp_path / "rules", **policy, rl={"rewards": rewards})
    base = load_config(job.config_path).base_model
    judge = write_reward_model(tmp_path / "judge", base if is_adapter else None, layers=3)
    needs, spec = [], ArchSpec.from_dir(base)
    for more in ({}, {"reward_model": str(judge)}):
        rl = {"rewards": rewards, **more}
        config = load_config(write_job(tmp_path / "rules", **policy, rl=rl).config_path)
        needs.append(plan_need(config, spec, CPU).total)

    def size(path: Path) -> int:
        return sum(t.nbytes for t in load_decoder(path, dtype=torch.float32).parameters())

    more = bases * size(base) + (judges * size(judge) if judges else 0)
    assert needs[1] - needs[0] == more


NO_JUDGES = {
    "there is nothing": (None, "has no reward_head.safetensors, so it is no reward model. Name"),
    "it was trained beside another base": ("/other", "Use one base for both, or a reward model"),
}


@pytest.mark.parametrize(("base", "text"), NO_JUDGES.values(), ids=NO_JUDGES)
def test_a_reward_model_is_refused_before_data_is_looked_for_where(
    tmp_path: Path, base: str | None, text: str
) -> None:
    judge = tmp_path / "judge"
    if base:
        write_reward_model(judge, Path(base))
    job = write_job(
        tmp_path / "job",
        **FULL,
        method="grpo",
        rl={"reward_model": str(judge)},
        evaluation={"suites": []},
        datasets=[{"name": "colours", "path": "/none.jsonl"}],
    )
    assert run(job) == 42
    assert text in job.last_word["message"]


def test_a_teacher_that_is_asked_at_each_step_stays_in_memory(tmp_path: Path) -> None:
    teacher = write_tiny_model(tmp_path / "teacher", layers=3)
    needs = []
    for on_policy in (False, True):
        rules = {"teacher": str(teacher), "on_policy": on_policy}
        job = write_job(tmp_path / str(on_policy), method="distill", distill=rules)
        config = load_config(job.config_path)
        needs.append(plan_need(config, ArchSpec.from_dir(config.base_model), CPU))
    held = sum(t.nbytes for t in load_decoder(teacher, dtype=torch.float32).parameters())
    assert needs[1].weights - needs[0].weights == held
    assert needs[1].moments == needs[0].moments


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
        "lora or qlora, a smaller base model, more memory, or more workers for "
        "one copy (parallelism.tensor)."
    )


COMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "merged": ("merge", {"kind": "adapter", "parts": [{"source": "/adapter"}]}),
    "quantized to 8 bits": ("quantize", {"scheme": "int8"}),
    "quantized to 4 bits": ("quantize", {"scheme": "int4", "group_size": 32}),
    "quantized to fp8": ("quantize", {"scheme": "fp8"}),
    "of fewer layers": ("prune", {"kind": "depth", "ratio": 0.5}),
    "of fewer hidden units": ("prune", {"kind": "width", "ratio": 0.5}),
    "of fewer heads": ("prune", {"kind": "heads", "ratio": 0.5}),
    "of zeros": ("prune", {"kind": "nm24"}),
}


def computing_job(root: Path, method: str, options: dict[str, Any], dtype: str) -> TrainConfig:
    job = write_job(root, method=method, **{method: options}, output={"kind": "model"})
    described = root / "model" / "config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "dtype": dtype}))
    return load_config(job.config_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("method", "options"), COMPUTED.values(), ids=COMPUTED)
def test_the_need_of_computing_is_known_before_a_weight_is_read_where_the_result_is(
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = computing_job(tmp_path, method, options, dtype)
    need = plan_computing(config, ArchSpec.from_dir(config.base_model))
    decoder = load_decoder(config.base_model, dtype=torch.float32)
    assert need.weights == sum(tensor.nbytes for tensor in decoder.parameters())
    assert need.beside == held_beside(decoder, config, tmp_path, monkeypatch)


FUSED: dict[str, PretrainedConfig] = {
    "GPT-2 whose layers scale": GPT2Config(
        vocab_size=300, n_embd=64, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "BLOOM": BloomConfig(vocab_size=300, hidden_size=64, n_layer=4, n_head=4),
    "OPT": OPTConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=128,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
}
CANNOT = {("BLOOM", "of fewer hidden units"), *((name, "of fewer heads") for name in FUSED)}
OTHERS = [(base, made) for base in FUSED for made in COMPUTED if (base, made) not in CANNOT]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("base", "made"), OTHERS, ids=" ".join)
def test_the_need_of_computing_counts_what_a_family_fuses(
    tmp_path: Path, base: str, made: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(FUSED[base]).save_pretrained(tmp_path / "base")
    described = tmp_path / "base" / "config.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "dtype": dtype}))
    save_tiny_tokenizer(tmp_path / "base")
    config = computing_job(tmp_path, *COMPUTED[made], dtype)
    config = config.model_copy(update={"base_model": tmp_path / "base"})
    need = plan_computing(config, ArchSpec.from_dir(config.base_model))
    decoder = load_decoder(config.base_model, dtype=torch.float32)
    assert need.weights == sum(tensor.nbytes for tensor in decoder.parameters())
    assert need.beside == held_beside(decoder, config, tmp_path, monkeypatch)


def held_beside(
    decoder: Decoder, config: TrainConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Compute and write the result; return the bytes of what stands beside the base by then."""
    tokenizer = Tokenizer.load(config.base_model)
    sample = Sample(np.arange(20, dtype=np.int32), np.arange(20) > 0)
    saved: dict[str, Tensor] = {}
    for module in (candidate_module, export_module):
        monkeypatch.setattr(module, "save_file", lambda tensors, *_, **__: saved.update(tensors))
    if config.merge is not None:
        made = {shard.name: shard.tensor.detach() for shard in decoder.shards()}
        write_model(
            folder,
            made.items(),
            spec=decoder.spec,
            base_model=config.base_model,
            tokenizer=tokenizer,
        )
    else:
        if config.quantize is not None:
            candidate = quantize(decoder, config.quantize, [sample])
        else:
            assert config.prune is not None
            candidate = prune(decoder, config.prune, [sample])
        made = {**candidate.weights, **candidate.packed}
        candidate.write(folder, base_model=config.base_model, tokenizer=tokenizer)
    base = {tensor.untyped_storage().data_ptr() for tensor in decoder.parameters()}
    storages = [t.untyped_storage() for t in (*made.values(), *saved.values())]
    beside = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in base}
    return sum(beside.values())


def test_gptq_also_holds_what_a_layer_s_inputs_have_in_common(tmp_path: Path) -> None:
    options = {"scheme": "int8", "algorithm": "gptq"}
    config = computing_job(tmp_path, "quantize", options, "float32")
    spec = ArchSpec.from_dir(config.base_model)
    decoder = load_decoder(config.base_model, dtype=torch.float32)
    assert config.quantize is not None
    candidate = quantize(decoder, config.quantize.model_copy(update={"algorithm": "rtn"}), ())
    packed = sum(tensor.nbytes for tensor in candidate.packed.values())
    grams = [width**2 * 4 for width in (64, 64, 64, 128)]
    assert plan_computing(config, spec).beside == packed + sum(grams) + 3 * max(grams)


@pytest.mark.parametrize("made", ["merged", "quantized to 8 bits", "of fewer layers"])
def test_what_could_not_be_written_down_is_not_computed(tmp_path: Path, made: str) -> None:
    config = computing_job(tmp_path, *COMPUTED[made], "float32")
    spec = ArchSpec.from_dir(config.base_model)
    factors = replace(spec, rope=RopeSpec(scaling="factors", factors=(1.0,) * 8))
    with pytest.raises(JobConfigError, match="Use a safetensors base model, or train an adapter"):
        plan_computing(config, factors)


def test_a_computation_that_cannot_fit_is_refused_before_its_data_is_looked_for(
    tmp_path: Path,
) -> None:
    missing = [{"name": "colours", "path": "/none.jsonl"}]
    rules = {"prune": {"kind": "depth", "ratio": 0.5}, "output": {"kind": "model"}}
    job = write_job(tmp_path, method="prune", datasets=missing, **rules)
    assert run(job, memory_bytes=1 << 10) == 42
    assert job.last_word["reason"] == "TrainingDoesNotFit"
    assert "the trainer has 0 MiB" in job.last_word["message"]
    assert run(job, memory_bytes=1 << 20) == 42
    assert job.last_word["reason"] == "DatasetNotFound"


def test_a_computation_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    need = ComputingNeed(weights=512 << 20, beside=256 << 20)
    check_computing_fits("merge", need, 768 << 20)
    with pytest.raises(ComputingDoesNotFitError) as caught:
        check_computing_fits("merge", need, 767 << 20)
    assert str(caught.value) == (
        "Method merge needs 512 MiB for the base model in float32 + 256 MiB for what it makes of "
        "it = 768 MiB of the host's memory, on a GPU too, and the trainer has 767 MiB. Give it "
        "more memory (spec.podTemplatePatch.resources) or use a smaller base model."
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
