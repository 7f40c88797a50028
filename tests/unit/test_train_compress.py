"""Models computed from models: what each way keeps, and what the gate lets through."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from hack.tiny_model import write_tiny_model
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraConfig, TrainableLora, save_adapter
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.compress.candidate import Candidate
from mizzen.runtime.train.compress.gptq import quantize_gptq
from mizzen.runtime.train.compress.merge import merge
from mizzen.runtime.train.compress.prune import prune
from mizzen.runtime.train.compress.quantize import quantize
from mizzen.runtime.train.compress.rounding import Grid, scales_for, to_levels, to_weights
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.methods.token_loss import token_losses_sum
from mizzen.runtime.train.options import Merge, Prune, Quantize
from mizzen.runtime.train.samples import Sample
from tests.fixtures.tiny_models import TINY, make_model, save_tiny_tokenizer
from tests.fixtures.train_runs import Job, run, write_job

MODEL = {"kind": "model"}


def samples(count: int = 6) -> list[Sample]:
    random = np.random.RandomState(0)
    return [
        Sample(random.randint(0, 250, 24).astype(np.int32), np.arange(24) > 0) for _ in range(count)
    ]


def loss(decoder: Decoder, lora: Any = None) -> float:
    with torch.no_grad():
        return token_losses_sum(decoder, pack(samples(), torch.device("cpu")), lora).item()


def computed(root: Path, method: str, options: dict[str, Any], **more: Any) -> Job:
    """Run a job of one of the methods that compute; its figures are in its last word."""
    return write_job(root, method=method, **{method: options}, output=MODEL, **more)


def rtn(weight_OI: Tensor, grid: Grid) -> Tensor:
    scale_OG = scales_for(weight_OI, grid)
    return to_weights(to_levels(weight_OI, scale_OG, grid), scale_OG)


GRIDS = {
    "int8": (Grid(bits=8), 0.02),
    "int4 in groups": (Grid(bits=4, group_size=32), 0.2),
    "fp8": (Grid(bits=8, is_float=True), 0.07),
}


@pytest.mark.parametrize(("grid", "allowed"), GRIDS.values(), ids=GRIDS)
def test_rounded_weights_stay_near(grid: Grid, allowed: float) -> None:
    weight_OI = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    error = (rtn(weight_OI, grid) - weight_OI).norm() / weight_OI.norm()
    assert 0 < error < allowed


def test_a_matrix_of_zeros_stays_one() -> None:
    zeros = torch.zeros(8, 64)
    assert torch.equal(rtn(zeros, Grid(bits=4, group_size=32)), zeros)


@pytest.mark.parametrize("group_size", [None, 32])
def test_gptq_changes_outputs_less_than_rounding_does(group_size: int | None) -> None:
    random = torch.Generator().manual_seed(0)
    # Inputs that go together: an error in one can be made up for in another.
    x_TI = torch.randn(500, 12, generator=random) @ torch.randn(12, 160, generator=random)
    x_TI += 0.1 * torch.randn(500, 160, generator=random)
    weight_OI = torch.randn(32, 160, generator=random)
    grid = Grid(bits=4, group_size=group_size)
    levels_OI, scale_OG = quantize_gptq(weight_OI, x_TI.T @ x_TI, grid)
    outputs = x_TI @ weight_OI.T
    by_gptq = (x_TI @ to_weights(levels_OI, scale_OG).T - outputs).norm()
    by_rounding = (x_TI @ rtn(weight_OI, grid).T - outputs).norm()
    assert by_gptq < 0.7 * by_rounding
    assert levels_OI.abs().max() <= 8


def test_gptq_gives_no_weight_to_inputs_that_nobody_uses() -> None:
    gram = torch.diag(torch.tensor([1.0, 0.0, 2.0, 1.0]))
    levels_OI, _ = quantize_gptq(torch.ones(3, 4), gram, Grid(bits=8))
    assert levels_OI[:, 1].tolist() == [0, 0, 0]


SCHEMES: dict[str, tuple[dict[str, Any], float]] = {
    "int8": ({"scheme": "int8"}, 0.005),
    "int4 by gptq": ({"scheme": "int4", "group_size": 32, "algorithm": "gptq"}, 0.05),
    "fp8": ({"scheme": "fp8"}, 0.02),
}


@pytest.mark.parametrize(("options", "change"), SCHEMES.values(), ids=SCHEMES)
def test_a_quantized_model_passes_its_gate_and_is_smaller_and_served(
    tmp_path: Path, options: dict[str, Any], change: float
) -> None:
    job = computed(tmp_path, "quantize", options)
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    # A random model's perplexity may move either way.
    assert 0 < abs(suite["regressionRatio"]) < change
    folder = Path(job.last_word["artifact"]["path"])
    linear = "model.layers.0.mlp.up_proj.weight"
    before = load_file(tmp_path / "model" / "model.safetensors")[linear]
    stored = load_file(folder / "model.safetensors")
    kept = [t.nbytes for name, t in stored.items() if name.startswith(linear)]
    assert sum(kept) < 0.4 * before.nbytes
    after = dict((s.name, s.tensor) for s in load_decoder(folder, dtype=torch.float32).shards())
    assert (after[linear] - before).norm() < 0.2 * before.norm()
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    assert [path.name for path in (tmp_path / "output").iterdir()] == [folder.name]


def test_groups_that_do_not_divide_are_refused_with_what_to_do(tmp_path: Path) -> None:
    job = computed(tmp_path, "quantize", {"scheme": "int4", "group_size": 128})
    assert run(job) == 42
    assert (
        "64 inputs do not divide into groups of 128. Lower quantize.groupSize"
        in (job.last_word["message"])
    )


def test_a_gate_blocks_what_two_of_four_weights_cost(tmp_path: Path) -> None:
    good = write_job(
        tmp_path / "good",
        adaptation={"type": "full"},
        output=MODEL,
        hyperparameters={"max_steps": 40, "learning_rate": 0.003},
    )
    assert run(good) == 0
    job = computed(
        tmp_path / "pruned", "prune", {"kind": "nm24"}, base_model=str(good.artifacts[0])
    )
    assert run(job) == 0
    word = job.last_word
    (suite,) = word["evaluation"]
    assert not suite["passed"] and suite["regressionRatio"] > 0.02
    assert (word["artifact"], job.artifacts) == (None, [])
    assert list((tmp_path / "pruned" / "output").iterdir()) == []


KINDS: dict[str, tuple[Prune, dict[str, int]]] = {
    "layers": (Prune(kind="depth", ratio=0.5), {"num_hidden_layers": 2}),
    "hidden units": (Prune(kind="width", ratio=0.5), {"intermediate_size": 64}),
    "heads": (Prune(kind="heads", ratio=0.5), {"num_attention_heads": 2, "head_dim": 16}),
}


@pytest.mark.parametrize(("rules", "says"), KINDS.values(), ids=KINDS)
def test_a_model_with_fewer(tmp_path: Path, rules: Prune, says: dict[str, int]) -> None:
    base = write_tiny_model(tmp_path / "deep", layers=4)
    options = rules.model_dump()
    lax = {"suites": [{"name": "holdout", "max_regression_ratio": 10.0}]}
    job = computed(tmp_path, "prune", options, base_model=str(base), evaluation=lax)
    assert run(job) == 0
    folder = Path(job.last_word["artifact"]["path"])
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in says} == says
    ours = load_decoder(folder, dtype=torch.float32)
    token_ids = torch.arange(20)
    with torch.no_grad():
        logits = ours.logits(ours(token_ids, token_ids, CausalAttention([20])))
        theirs = AutoModelForCausalLM.from_pretrained(folder)(token_ids[None]).logits[0]
    torch.testing.assert_close(logits, theirs, rtol=1e-3, atol=1e-3)


def test_what_pruning_layers_costs_is_won_back_by_learning_from_the_whole_model(
    tmp_path: Path,
) -> None:
    full = {"adaptation": {"type": "full"}, "output": MODEL}
    steps = {"hyperparameters": {"max_steps": 40, "learning_rate": 0.003}}
    lax = {"evaluation": {"suites": [{"name": "holdout", "max_regression_ratio": 10.0}]}}
    base = write_tiny_model(tmp_path / "deep", layers=4)
    whole = write_job(tmp_path / "whole", base_model=str(base), **full, **steps)
    assert run(whole) == 0
    (teacher,) = whole.artifacts
    rules = {"kind": "depth", "ratio": 0.5}
    pruned = computed(tmp_path / "pruned", "prune", rules, base_model=str(teacher), **lax)
    assert run(pruned) == 0
    (student,) = pruned.artifacts
    recovered = write_job(
        tmp_path / "recovered",
        method="distill",
        distill={"teacher": str(teacher), "samples": 16},
        base_model=str(student),
        **full,
        **steps,
    )
    assert run(recovered) == 0
    (cost,), (won,) = pruned.last_word["evaluation"], recovered.last_word["evaluation"]
    assert won["base"] == pytest.approx(cost["candidate"], rel=1e-3), "of the same held-out text"
    assert cost["candidate"] > 2 * cost["base"]
    assert won["candidate"] < (cost["base"] + cost["candidate"]) / 2, "half of what was lost"


def test_what_is_pruned_is_what_adds_least(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path, layers=3), dtype=torch.float32)
    tensors = {shard.name: shard.tensor for shard in decoder.shards()}
    quiet = "model.layers.1"
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"{quiet}.{name}.weight"].mul_(1e-4)
        unit = torch.arange(128) % 2 == 0
        tensors["model.layers.0.mlp.down_proj.weight"][:, unit] *= 1e-3
    shallow = prune(decoder, Prune(kind="depth", ratio=0.34), samples())
    assert torch.equal(
        shallow.weights["model.layers.1.mlp.up_proj.weight"],
        tensors["model.layers.2.mlp.up_proj.weight"],
    )
    narrow = prune(decoder, Prune(kind="width", ratio=0.5), samples())
    assert torch.equal(
        narrow.weights["model.layers.0.mlp.down_proj.weight"],
        tensors["model.layers.0.mlp.down_proj.weight"][:, ~unit],
    )


def test_pruning_that_leaves_nothing_or_all_is_refused(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path), dtype=torch.float32)
    for ratio in (0.9, 0.1):
        with pytest.raises(JobConfigError, match=r"Choose one that leaves some and takes some"):
            prune(decoder, Prune(kind="depth", ratio=ratio), samples())


FOUR_LAYERS: dict[str, Any] = {**TINY, "intermediate_size": 128, "num_hidden_layers": 4}
WINDOWED: dict[str, PretrainedConfig] = {
    "in every layer": MistralConfig(**FOUR_LAYERS, sliding_window=7),
    "in the last two": Qwen2Config(
        **FOUR_LAYERS, use_sliding_window=True, sliding_window=7, max_window_layers=2
    ),
}


def windowed(root: Path, config: PretrainedConfig) -> Path:
    make_model(config).save_pretrained(root / "base")
    save_tiny_tokenizer(root / "base")
    return root / "base"


def logits_of(decoder: Decoder) -> Tensor:
    token_ids = torch.arange(20)
    with torch.no_grad():
        return decoder.logits(decoder(token_ids, token_ids, CausalAttention([20])))


def written(candidate: Candidate, base: Path) -> Path:
    folder = base.parent / "candidate"
    folder.mkdir()
    candidate.write(folder, base_model=base, tokenizer=Tokenizer.load(base))
    assert ArchSpec.from_dir(folder).windows == candidate.spec.windows
    return folder


def idle(kind: str, tensors: dict[str, Tensor]) -> None:
    """Have half of a model do nothing: layers 0 and 3, every other unit, or the first KV head."""
    for name, tensor in tensors.items():
        is_out, is_down = (name.endswith(f"{last}_proj.weight") for last in ("o", "down"))
        if kind == "depth" and (is_out or is_down) and name.split(".")[2] in ("0", "3"):
            tensor.zero_()
        elif kind == "width" and is_down:
            tensor[:, ::2] = 0
        elif kind == "heads" and is_out:
            tensor[:, :32] = 0


@pytest.mark.parametrize("kind", ["depth", "width", "heads"])
@pytest.mark.parametrize("config", WINDOWED.values(), ids=WINDOWED)
def test_what_idles_is_left_out_of_a_model_with_windows(
    tmp_path: Path, config: PretrainedConfig, kind: Any
) -> None:
    base = windowed(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    with torch.no_grad():
        idle(kind, {shard.name: shard.tensor for shard in decoder.shards()})
    whole = logits_of(decoder)
    folder = written(prune(decoder, Prune(kind=kind, ratio=0.5), samples()), base)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(20)[None]).logits[0]
    for found in (logits_of(load_decoder(folder, dtype=torch.float32)), theirs):
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)


FEWER_BITS = {
    "int8": Quantize(scheme="int8"),
    "int4 by rounding": Quantize(scheme="int4", group_size=32),
    "int4 by gptq": Quantize(scheme="int4", group_size=32, algorithm="gptq"),
}


@pytest.mark.parametrize("rules", FEWER_BITS.values(), ids=FEWER_BITS)
@pytest.mark.parametrize("config", WINDOWED.values(), ids=WINDOWED)
def test_a_model_with_windows_is_written_as_it_was_rounded(
    tmp_path: Path, config: PretrainedConfig, rules: Quantize
) -> None:
    base = windowed(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    before = logits_of(decoder)
    folder = written(quantize(decoder, rules, samples()), base)
    rounded = logits_of(decoder)
    assert not torch.allclose(rounded, before, rtol=1e-3, atol=1e-3)
    found = logits_of(load_decoder(folder, dtype=torch.float32))
    torch.testing.assert_close(found, rounded, rtol=1e-4, atol=1e-4)


def test_a_job_quantizes_a_model_with_windows(tmp_path: Path) -> None:
    base = windowed(tmp_path, WINDOWED["in the last two"])
    rules = {"scheme": "int4", "group_size": 32, "algorithm": "gptq"}
    lax = {"suites": [{"name": "holdout", "max_regression_ratio": 10.0}]}
    job = computed(tmp_path, "quantize", rules, base_model=str(base), evaluation=lax)
    assert run(job) == 0
    assert len(job.artifacts) == 1


def adapter_for(decoder: Decoder, folder: Path) -> TrainableLora:
    lora = TrainableLora(decoder, LoraConfig(rank=2, alpha=8.0))
    torch.manual_seed(0)
    with torch.no_grad():
        for matrix in lora.b.values():
            matrix.normal_(std=0.1)
    save_adapter(folder, lora.adapter(), base_model="base")
    return lora


def merge_of(kind: str, *parts: tuple[Path, float], **more: Any) -> Merge:
    entries = [{"source": path, "weight": weight} for path, weight in parts]
    return Merge.model_validate({"kind": kind, "parts": entries, **more})


def test_an_adapter_merged_into_its_base_computes_what_it_did_beside_it(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path / "model"), dtype=torch.float32)
    lora = adapter_for(decoder, tmp_path / "adapter")
    beside, base = loss(decoder, lora), loss(decoder)
    merge(decoder, merge_of("adapter", (tmp_path / "adapter", 1.0)))
    assert loss(decoder) == pytest.approx(beside, rel=1e-4)
    assert base != pytest.approx(beside, rel=1e-3)


def other_model(path: Path, change: float) -> Path:
    write_tiny_model(path)
    tensors = load_file(path / "model.safetensors")
    save_file({n: t + change for n, t in tensors.items()}, path / "model.safetensors")
    return path


def test_a_delta_is_added_and_models_are_averaged(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "model")
    other = other_model(tmp_path / "other", 0.5)
    name = "model.layers.1.self_attn.k_proj.weight"
    before = load_file(base / "model.safetensors")[name]

    def merged(rules: Merge) -> Tensor:
        decoder = load_decoder(base, dtype=torch.float32)
        merge(decoder, rules)
        return {shard.name: shard.tensor for shard in decoder.shards()}[name]

    torch.testing.assert_close(merged(merge_of("delta", (other, 1.0))), 2 * before + 0.5)
    average = merge_of("average", (other, 3.0), base_weight=1.0)
    torch.testing.assert_close(merged(average), before + 0.5 * 3 / 4)


def test_merging_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path / "model"), dtype=torch.float32)
    wide = load_decoder(write_tiny_model(tmp_path / "wide", width=128), dtype=torch.float32)
    adapter_for(wide, tmp_path / "adapter")
    with pytest.raises(JobConfigError, match="Merge it into the model it was trained on"):
        merge(decoder, merge_of("adapter", (tmp_path / "adapter", 1.0)))
    with pytest.raises(JobConfigError, match="Models of one architecture and vocabulary"):
        merge(decoder, merge_of("average", (tmp_path / "wide", 1.0)))
    with pytest.raises(JobConfigError, match="whose sum is above zero"):
        parts = (tmp_path / "model", 0.0)
        merge(decoder, merge_of("average", parts, base_weight=0.0))


def test_a_merge_needs_no_data_and_publishes_a_model(tmp_path: Path) -> None:
    decoder = load_decoder(write_tiny_model(tmp_path / "model"), dtype=torch.float32)
    adapter_for(decoder, tmp_path / "adapter")
    parts = [{"source": str(tmp_path / "adapter")}]
    options = {"kind": "adapter", "parts": parts}
    job = computed(tmp_path, "merge", options, datasets=[], evaluation={"suites": []})
    assert run(job) == 0
    word = job.last_word
    assert (word["phase"], word["artifact"]["kind"], word["evaluation"]) == (
        "Succeeded",
        "model",
        [],
    )
    assert word["dataset"] is None
