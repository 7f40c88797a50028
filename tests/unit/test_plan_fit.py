"""What a model takes, on how many devices it fits, and what is said where it does not."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mizzen.cli.commands import app
from mizzen.operator.planning.fit import GIB, KV_SHARE, DoesNotFitError, Wish, plan_fit
from mizzen.operator.planning.model_shape import ModelShapeError, read_model_shape
from mizzen.runtime.engine import kv_room
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import Placement
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.shard import head_shard
from mizzen.runtime.parallel.stages import Stages

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
}
SMOLLM2 = LLAMA_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN3_8B = LLAMA_8B | {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
}
QWEN2_7B = QWEN3_8B | {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
GPTJ = {
    "architectures": ["GPTJForCausalLM"],
    "n_embd": 4096,
    "n_head": 16,
    "n_layer": 28,
    "n_positions": 2048,
    "n_inner": None,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}
OPT_6_7B = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 4096,
    "ffn_dim": 16384,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 50272,
    "word_embed_proj_dim": 4096,
}
OPT_350M = OPT_6_7B | {
    "hidden_size": 1024,
    "ffn_dim": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
}
BLOOM_7B1 = {
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 4096,
    "n_head": 32,
    "n_layer": 30,
    "vocab_size": 250880,
}
# As transformers counts them on the published checkpoints.
PARAMETERS = {
    "Llama-3-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3-70B": (LLAMA_70B, 70_553_706_496),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Qwen3-8B": (QWEN3_8B, 8_190_735_360),
    "Qwen2-7B": (QWEN2_7B, 7_615_616_512),
    "GPT-2": (GPT2, 124_439_808),
    "GPT-J-6B": (GPTJ, 6_050_882_784),
    "OPT-6.7B": (OPT_6_7B, 6_658_473_984),
    "OPT-350M": (OPT_350M, 331_196_416),
    "BLOOM-7B1": (BLOOM_7B1, 7_069_016_064),
}


@pytest.mark.parametrize(("config", "parameters"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_are_counted_as_published(config: dict[str, object], parameters: int) -> None:
    assert read_model_shape(config).parameters == parameters


def wish(**changes: object) -> Wish:
    h100 = Wish(
        accelerator="h100",
        device_bytes=int(79.6 * GIB),
        dtype="bfloat16",
        max_len=8192,
        request_tokens=2048,
    )
    return replace(h100, **changes)  # type: ignore[arg-type]


def test_a_model_goes_on_the_fewest_devices_that_hold_it() -> None:
    small = plan_fit(read_model_shape(LLAMA_8B), wish())
    assert small.tensor == 1
    assert small.weight_bytes == 2 * 8_030_261_248
    assert small.kv_bytes_per_token == 128 * 1024
    large = plan_fit(read_model_shape(LLAMA_70B), wish())
    assert large.tensor == 2
    assert large.kv_bytes_per_token_per_rank == large.kv_bytes_per_token // 2
    assert large.max_concurrency == large.kv_tokens // 2048
    assert large.max_concurrency_longest == large.kv_tokens // 8192


def test_the_cache_gets_what_the_runtime_would_give_it() -> None:
    assert kv_room.KV_SHARE["cuda"] == KV_SHARE
    fit = plan_fit(read_model_shape(LLAMA_8B), wish())
    free = fit.device_bytes - GIB // 2 - fit.weight_bytes
    assert fit.kv_tokens == pytest.approx(0.85 * free / (128 * 1024), rel=0.001)


@pytest.mark.parametrize("tensor", [1, 2, 3, 9])
def test_unequal_ranks_are_sized_by_the_largest_as_the_runtime_shards_them(tensor: int) -> None:
    fit = plan_fit(read_model_shape(SMOLLM2), wish(tensor=tensor))
    spec = ArchSpec.from_config(SMOLLM2)
    shards = [
        head_shard(heads=spec.heads, kv_heads=spec.kv_heads, rank=rank, size=tensor)
        for rank in range(tensor)
    ]
    largest = max(shard.kv.size for shard in shards)
    assert fit.kv_bytes_per_token_per_rank == 2 * 30 * 64 * 2 * largest


@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize("config", [LLAMA_8B, SMOLLM2, GPT2, OPT_350M], ids=str)
def test_stages_are_sized_by_the_largest_as_the_runtime_cuts_them(
    config: dict[str, object], stages: int
) -> None:
    shape, spec = read_model_shape(config), ArchSpec.from_config(config)
    held = []
    for rank in range(stages):
        group = RankGroup(stages=Stages(stages, rank=rank, size=stages))
        decoder = Decoder(spec, Placement(torch.bfloat16, torch.device("meta"), group))
        held.append(sum(prod(shard.whole) for shard in decoder.shards()))
        assert decoder.layers.size <= shape.stage_layers(stages)
    # Positions that only the first holds count for the last one too: few beside the rest.
    assert max(held) <= shape.stage_parameters(stages) <= 1.02 * max(held)
    if spec.positions == "rope":
        assert shape.stage_parameters(stages) == max(held)


def test_stages_hold_what_no_number_of_devices_for_a_layer_could() -> None:
    small = wish(device_bytes=15 * GIB, accelerator="t4")
    shape = read_model_shape(LLAMA_70B)
    with pytest.raises(DoesNotFitError, match="raise pipeline parallelism above 1"):
        plan_fit(shape, small)
    fit = plan_fit(shape, replace(small, tensor=8, pipeline=2))
    assert (fit.tensor, fit.pipeline) == (8, 2)
    assert fit.weight_bytes_per_rank == pytest.approx(
        2 * (40 * shape.layer_parameters + shape.table_parameters) / 8, rel=0.001
    )
    assert fit.kv_bytes_per_token_per_rank == fit.kv_bytes_per_token // 16
    with pytest.raises(DoesNotFitError, match="80 layers and cannot be cut into 81 stages"):
        plan_fit(shape, replace(small, pipeline=81))


REFUSED = {
    "more ranks than the heads can be spread over": (
        SMOLLM2,
        {"tensor": 4},
        r"9 query heads over 3 KV heads .* 4 ranks. Choose one of: 1, 2, 3, 6",
    ),
    "more tokens than the model's context": (LLAMA_8B, {"max_len": 9000}, "at most 8192"),
    "weights larger than the chosen devices": (
        LLAMA_70B,
        {"tensor": 1},
        r"131.4 GiB of the device's 79.6 GiB .* 0.0 GiB are left .* above 1; or choose a device",
    ),
    "weights larger than any allowed number of devices": (
        LLAMA_70B,
        {"device_bytes": 15 * GIB, "accelerator": "t4"},
        r"On 8 x t4 a rank needs 16.4 GiB",
    ),
    "one request larger than what is left": (
        LLAMA_8B | {"max_position_embeddings": 131072},
        {"device_bytes": 24 * GIB, "max_len": 131072, "tensor": 1},
        r"16.0 GiB for one request of 131072 tokens.*set the maximum length to at most \d+",
    ),
    "float32 where bfloat16 would do": (
        LLAMA_8B,
        {"device_bytes": 24 * GIB, "dtype": "float32", "tensor": 1},
        "use bfloat16",
    ),
}


@pytest.mark.parametrize(("config", "changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_fit_is_refused_with_the_numbers(
    config: dict[str, object], changes: dict[str, object], said: str
) -> None:
    with pytest.raises(DoesNotFitError, match=said):
        plan_fit(read_model_shape(config), wish(**changes))


BROKEN = {
    "unknown architecture": ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*Known:"),
    "no architecture": ({}, "nowhere"),
    "a missing size": ({"architectures": ["LlamaForCausalLM"]}, "no field hidden_size"),
    "a size that is none": (LLAMA_8B | {"num_hidden_layers": "many"}, "num_hidden_layers.*'many'"),
    "a negative size": (LLAMA_8B | {"vocab_size": -1}, "vocab_size is -1"),
}


@pytest.mark.parametrize(("config", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_named(config: dict[str, object], said: str) -> None:
    with pytest.raises(ModelShapeError, match=said):
        read_model_shape(config)


def test_the_command_prints_a_table_json_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    runner = CliRunner()
    text = runner.invoke(app, ["plan", str(tmp_path)])
    assert text.exit_code == 0, text.output
    assert "14.96 GiB as bfloat16" in text.output and "1 x h100" in text.output
    cut = runner.invoke(app, ["plan", str(tmp_path), "--pipeline-parallel-size", "2"])
    assert "2 x h100: 2 stages of 1" in cut.output
    found = runner.invoke(app, ["plan", str(tmp_path / "config.json"), "--gpu", "l4", "--json"])
    assert json.loads(found.output)["tensor"] == 1
    for arguments, said in (
        ([str(tmp_path / "absent")], "There is no file"),
        ([str(tmp_path), "--gpu", "abacus"], "--gpu-memory-gib"),
        ([str(tmp_path), "--dtype", "int3"], "none of auto"),
        ([str(tmp_path), "--gpu", "t4", "--tensor-parallel-size", "1"], "To make it fit"),
    ):
        refused = runner.invoke(app, ["plan", *arguments])
        assert refused.exit_code == 2
        assert said in refused.output
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in runner.invoke(app, ["plan", str(tmp_path)]).output
