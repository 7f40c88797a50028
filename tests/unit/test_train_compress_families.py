"""Every family can be quantized and pruned, as far as its files can say what was made of it.

What is written is read by our own loader, and by transformers, whose own modules say which tensors
there have to be and how outputs and inputs lie in them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.compressed import unpack_words
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.compress.candidate import Candidate
from mizzen.runtime.train.compress.prune import prune, smaller_spec
from mizzen.runtime.train.compress.quantize import quantize, warn_of_readers
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.options import Prune, Quantize
from mizzen.runtime.train.samples import Sample
from tests.fixtures.tiny_models import TINY, make_model, save_gguf, save_tiny_tokenizer
from tests.fixtures.train_runs import run, write_job

THREE: dict[str, Any] = {**TINY, "num_hidden_layers": 3}
OLD: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {**OLD, "init_std": 0.2, "ffn_dim": 128, "max_position_embeddings": 64}
MODELS: dict[str, PretrainedConfig] = {
    "GPT-2": GPT2Config(**OLD, n_positions=64),
    "GPT-2 with its other scales": GPT2Config(
        **OLD, n_positions=64, n_inner=96, scale_attn_by_inverse_layer_idx=True
    ),
    "OPT": OPTConfig(**OPT, word_embed_proj_dim=64),
    "OPT-350m: norms after, narrow token vectors": OPTConfig(
        **OPT, word_embed_proj_dim=32, do_layer_norm_before=False
    ),
    "BLOOM, three heads": BloomConfig(**{**OLD, "num_attention_heads": 3, "hidden_size": 96}),
    "GPT-J": GPTJConfig(**OLD, n_positions=64, rotary_dim=6),
    "LLaMA with biases": LlamaConfig(**THREE, attention_bias=True, mlp_bias=True),
    "Mistral": MistralConfig(**THREE, sliding_window=9),
    "Qwen2, tied": Qwen2Config(**{**THREE, "tie_word_embeddings": True}),
    "Qwen3": Qwen3Config(**{**THREE, "hidden_size": 96, "head_dim": 32}),
}
SCHEMES = {
    "int8": Quantize(scheme="int8"),
    "int4 by rounding": Quantize(scheme="int4", group_size=32),
    "int4 by gptq": Quantize(scheme="int4", group_size=32, algorithm="gptq"),
    "int8 by gptq": Quantize(scheme="int8", algorithm="gptq"),
    "fp8": Quantize(scheme="fp8"),
    "fp8 by gptq": Quantize(scheme="fp8", algorithm="gptq"),
}
TOKENS = torch.arange(5, 37)

of_each_family = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def samples(count: int = 6) -> list[Sample]:
    random = np.random.RandomState(0)
    return [
        Sample(random.randint(0, 250, 24).astype(np.int32), np.arange(24) > 0) for _ in range(count)
    ]


def saved(root: Path, config: PretrainedConfig) -> Path:
    make_model(config).save_pretrained(root / "base")
    save_tiny_tokenizer(root / "base")
    return root / "base"


def written(candidate: Candidate, base: Path, tokenizer: Tokenizer | None = None) -> Path:
    folder = base.parent / "candidate"
    folder.mkdir()
    candidate.write(folder, base_model=base, tokenizer=tokenizer or Tokenizer.load(base))
    assert ArchSpec.from_dir(folder) == candidate.spec
    return folder


@torch.no_grad()
def logits_of(decoder: Decoder) -> Tensor:
    hidden = decoder(TOKENS, torch.arange(len(TOKENS)), CausalAttention([len(TOKENS)]))
    return decoder.logits(hidden)


@torch.no_grad()
def logits_of_transformers(model: nn.Module) -> Tensor:
    return model(TOKENS[None]).logits[0]


def assert_read_alike(folder: Path, expected: Tensor) -> None:
    """Compare what we read and what transformers reads."""
    found = logits_of(load_decoder(folder, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of_transformers(theirs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rules", SCHEMES.values(), ids=SCHEMES)
@of_each_family
def test_a_quantized_model_is_read_as_it_was_rounded(
    tmp_path: Path, config: PretrainedConfig, rules: Quantize
) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    before = logits_of(decoder)
    folder = written(quantize(decoder, rules, samples()), base)
    rounded = logits_of(decoder)
    assert not torch.allclose(rounded, before, rtol=1e-3, atol=1e-3)
    found = logits_of(load_decoder(folder, dtype=torch.float32))
    torch.testing.assert_close(found, rounded, rtol=1e-4, atol=1e-4)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(theirs, folder)
    torch.testing.assert_close(logits_of_transformers(theirs), rounded, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def fill(model: nn.Module, folder: Path) -> None:
    """Do as compressed-tensors: every linear that is not ignored has words or levels, and scales.

    It knows no Conv1D. As vLLM does, a `weight` of one is turned, and what else it has is not.
    """
    tensors = load_file(folder / "model.safetensors")
    rules = json.loads((folder / "config.json").read_text())["quantization_config"]
    (group,) = rules["config_groups"].values()
    kinds = {"Linear": nn.Linear, "Conv1D": Conv1D}
    targets = tuple(kinds[target] for target in group["targets"])
    for name, module in model.named_modules():
        if not isinstance(module, targets) or name in rules["ignore"]:
            continue
        is_turned = isinstance(module, Conv1D)
        scale = tensors.pop(f"{name}.weight_scale").float()
        if rules["format"] == "pack-quantized":
            words, shape = (tensors.pop(f"{name}.weight_{part}") for part in ("packed", "shape"))
            levels = unpack_words(words, bits=group["weights"]["num_bits"])
            assert list(levels.shape) == shape.tolist()
        else:
            levels = tensors.pop(f"{name}.weight")
            levels = levels.T if is_turned else levels
        width = levels.shape[1] // scale.shape[1]
        assert width == group["weights"]["group_size"] or scale.shape[1] == 1
        weight = levels.float() * scale.repeat_interleave(width, dim=1)
        module.weight.copy_(weight.T if is_turned else weight)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert unexpected == []
    left = {n for n, p in model.named_parameters() if not n.endswith("weight") or p.dim() == 1}
    assert not left & set(missing)


@pytest.mark.parametrize("scheme", ["int4 by rounding", "fp8"])
@of_each_family
def test_two_ranks_read_the_parts_of_a_quantized_model(
    tmp_path: Path, config: PretrainedConfig, scheme: str
) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    folder = written(quantize(decoder, SCHEMES[scheme], ()), base)
    whole = {shard.name: shard.tensor for shard in decoder.shards()}
    for rank in (0, 1):
        part = load_decoder(folder, dtype=torch.float32, group=RankGroup(rank, 2))
        for shard in part.shards():
            expected = whole[shard.name]
            if shard.rows is not None:
                expected = expected[shard.rows.start : shard.rows.stop]
            if shard.columns is not None:
                expected = expected[:, shard.columns.start : shard.columns.stop]
            torch.testing.assert_close(shard.tensor, expected, rtol=1e-5, atol=1e-6)


def test_linears_that_stay_whole_are_named_to_other_engines(tmp_path: Path) -> None:
    base = saved(tmp_path, MODELS["OPT-350m: norms after, narrow token vectors"])
    decoder = load_decoder(base, dtype=torch.float32)
    said = quantize(decoder, SCHEMES["int8"], ()).changes["quantization_config"]
    assert said["ignore"] == ["lm_head", "model.decoder.project_in", "model.decoder.project_out"]


def test_a_quantized_gpt2_says_that_its_matrices_are_no_linears_elsewhere(tmp_path: Path) -> None:
    base = saved(tmp_path, MODELS["GPT-2"])
    said = quantize(load_decoder(base, dtype=torch.float32), SCHEMES["int8"], ()).changes
    (group,) = said["quantization_config"]["config_groups"].values()
    assert group["targets"] == ["Linear", "Conv1D"]


def layers_kept(candidate: Candidate, decoder: Decoder) -> list[int]:
    """Tell by a norm, which no cut changes and which differs from layer to layer."""
    norms = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(3)]
    before = {shard.name: shard.tensor for shard in decoder.shards()}
    return [
        layer
        for place in range(candidate.spec.layers)
        for layer in range(3)
        if torch.equal(candidate.weights[norms[place]], before[norms[layer]])
    ]


@of_each_family
def test_a_model_with_fewer_layers_computes_what_is_left(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    with torch.no_grad():
        for shard in decoder.shards():
            if any(f"layers.0.{end}" in shard.name for end in ("self_attn.o", "mlp.down")):
                shard.tensor.mul_(1e-4)
    candidate = prune(decoder, Prune(kind="depth", ratio=0.34), samples())
    kept = layers_kept(candidate, decoder)
    # After norms that follow each addition the stream is another one, whatever was added.
    assert len(kept) == 2 and (kept == [1, 2] or decoder.spec.block == "post_norm")
    folder = written(candidate, base)
    decoder.blocks = nn.ModuleList(decoder.blocks[layer] for layer in kept)
    assert_read_alike(folder, logits_of(decoder))


HAS_UNITS = {name: config for name, config in MODELS.items() if not name.startswith("BLOOM")}
HAS_HEAD_DIM = {
    name: config for name, config in MODELS.items() if name.startswith(("LLaMA", "Mistral", "Qwen"))
}


@pytest.mark.parametrize("config", HAS_UNITS.values(), ids=HAS_UNITS)
def test_hidden_units_that_idle_are_left_out(tmp_path: Path, config: PretrainedConfig) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    units = decoder.spec.intermediate_size
    idle = torch.arange(units) % 3 != 0
    with torch.no_grad():
        for shard in decoder.shards():
            if shard.name.endswith("down_proj.weight"):
                shard.tensor[:, idle] = 0
    folder = written(prune(decoder, Prune(kind="width", ratio=0.5), samples()), base)
    assert ArchSpec.from_dir(folder).intermediate_size < units
    assert_read_alike(folder, logits_of(decoder))


@pytest.mark.parametrize("config", HAS_HEAD_DIM.values(), ids=HAS_HEAD_DIM)
def test_heads_that_idle_are_left_out(tmp_path: Path, config: PretrainedConfig) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    with torch.no_grad():
        for shard in decoder.shards():
            if shard.name.endswith("o_proj.weight"):
                shard.tensor[:, : shard.tensor.shape[1] // 2] = 0
    folder = written(prune(decoder, Prune(kind="heads", ratio=0.5), samples()), base)
    assert (ArchSpec.from_dir(folder).heads, ArchSpec.from_dir(folder).kv_heads) == (2, 1)
    assert_read_alike(folder, logits_of(decoder))


@of_each_family
def test_two_of_each_four_weights_are_gone(tmp_path: Path, config: PretrainedConfig) -> None:
    base = saved(tmp_path, config)
    decoder = load_decoder(base, dtype=torch.float32)
    folder = written(prune(decoder, Prune(kind="nm24"), ()), base)
    for shard in load_decoder(folder, dtype=torch.float32).shards():
        if "_proj.weight" in shard.name:
            fours = shard.tensor.unflatten(1, (-1, 4))
            assert ((fours == 0).sum(-1) == 2).all()
    assert_read_alike(folder, logits_of(decoder))


REFUSED: dict[str, tuple[str, str, str]] = {
    "heads of GPT-2": ("GPT-2", "heads", "depth or width"),
    "heads of OPT": ("OPT", "heads", "depth or width"),
    "heads of BLOOM": ("BLOOM, three heads", "heads", "depth"),
    "heads of GPT-J": ("GPT-J", "heads", "depth or width"),
    "hidden units of BLOOM": ("BLOOM, three heads", "width", "depth"),
}
RULES = {
    "heads": "no word for head_dim, which is the model's width divided by its heads to all",
    "width": "no word for intermediate_size, which is 4 times the model's width to all",
}


@pytest.mark.parametrize(("name", "kind", "others"), REFUSED.values(), ids=REFUSED)
def test_what_a_family_cannot_say_is_refused(
    tmp_path: Path, name: str, kind: Any, others: str
) -> None:
    spec = ArchSpec.from_dir(saved(tmp_path, MODELS[name]))
    with pytest.raises(JobConfigError) as caught:
        smaller_spec(spec, Prune(kind=kind, ratio=0.5))
    assert f"family {spec.family} cannot be cut by prune.kind {kind}" in str(caught.value)
    assert RULES[kind] in str(caught.value)
    assert str(caught.value).endswith(f"Set prune.kind to {others}.")


def test_matrices_that_do_not_divide_into_fours_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(**{**OPT, "ffn_dim": 90}, word_embed_proj_dim=64)
    decoder = load_decoder(saved(tmp_path, config), dtype=torch.float32)
    with pytest.raises(JobConfigError, match=r"90 inputs do not divide into fours\. Set prune"):
        prune(decoder, Prune(kind="nm24"), ())


def test_a_job_is_refused_before_its_data_is_looked_for(tmp_path: Path) -> None:
    job = write_job(
        tmp_path,
        method="prune",
        prune={"kind": "heads", "ratio": 0.5},
        output={"kind": "model"},
        base_model=str(saved(tmp_path, MODELS["BLOOM, three heads"])),
        datasets=[{"name": "colours", "path": "/none.jsonl"}],
    )
    assert run(job) == 42
    assert "family bloom cannot be cut by prune.kind heads" in job.last_word["message"]


@pytest.mark.parametrize("name", ["GPT-2", "BLOOM, three heads"])
def test_a_job_quantizes_what_is_fused(tmp_path: Path, name: str) -> None:
    job = write_job(
        tmp_path,
        method="quantize",
        quantize={"scheme": "int8", "algorithm": "gptq"},
        output={"kind": "model"},
        base_model=str(saved(tmp_path, MODELS[name])),
        evaluation={"suites": [{"name": "holdout", "max_regression_ratio": 10.0}]},
    )
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    assert 0 < abs(suite["regressionRatio"]) < 0.05


def test_only_what_transformers_cannot_read_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for family in ("bloom", "gptj", "llama", "opt"):
        warn_of_readers(family)
    assert caplog.text == ""
    warn_of_readers("gpt2")
    assert "transformers reads no compressed gpt2" in caplog.text


# As published checkpoints spell what transformers writes anew.
@pytest.mark.parametrize(
    ("taken", "added", "says"),
    [
        ("n_inner", {}, {"n_inner": 64}),
        ("n_inner", {"intermediate_size": 128}, {"intermediate_size": 64}),
        ("none", {}, {"n_inner": 64}),
    ],
    ids=["not said", "in another word", "as null"],
)
def test_a_cut_is_said_in_the_words_of_the_base(
    tmp_path: Path, taken: str, added: dict[str, int], says: dict[str, int]
) -> None:
    base = saved(tmp_path, GPT2Config(**{**OLD, "hidden_size": 32}, n_positions=64))
    described = json.loads((base / "config.json").read_text())
    described.pop(taken, None)
    (base / "config.json").write_text(json.dumps(described | added))
    decoder = load_decoder(base, dtype=torch.float32)
    folder = written(prune(decoder, Prune(kind="width", ratio=0.5), samples()), base)
    config = json.loads((folder / "config.json").read_text())
    widths = ("n_inner", "intermediate_size", "ffn_dim")
    assert {name: config[name] for name in widths if name in config} == says


GGUF = {
    "GPT-2": GPT2Config(**OLD, n_positions=64, activation_function="gelu_pytorch_tanh"),
    "BLOOM": MODELS["BLOOM, three heads"],
    "Qwen2": Qwen2Config(**THREE),
}


@pytest.mark.parametrize("config", GGUF.values(), ids=GGUF)
def test_a_gguf_file_becomes_a_directory_in_the_family_s_own_words(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    save_gguf(tmp_path / "model.gguf", make_model(config))
    save_tiny_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    decoder = load_decoder(tmp_path / "model.gguf", dtype=torch.float32)
    candidate = prune(decoder, Prune(kind="depth", ratio=0.34), samples())
    folder = written(candidate, tmp_path / "model.gguf", tokenizer)
    decoder.blocks = nn.ModuleList(
        decoder.blocks[layer] for layer in layers_kept(candidate, decoder)
    )
    assert_read_alike(folder, logits_of(decoder))
