"""The benchmarks' scripts run, on a tiny model and without their peers. No figure is checked."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gateway_latency, train_rl
from benchmarks.checkpoint import kv_token_bytes, step_weight_bytes, weight_bytes
from benchmarks.peers import wanted_requirements
from benchmarks.random_models import SHAPES, write_random_model
from hack.tiny_model import write_tiny_model

# What each is asked for, and what its last row must hold.
IN_PROCESS = {
    "prefix_cache": (["MODEL", "--prefix-tokens=64", "--rounds=1"], "on_over_off"),
    "perplexity": (["MODEL", "--tokens=128", "--window=64"], "over_reference_pct"),
    "decode_profile": (["MODEL", "--rows=2", "--context=20", "--steps=2", "--top=3"], "operator"),
    "loan_stops": (["MODEL", "--requests=3", "--sample-words=8", "--threads=1"], "stop_max_ms"),
    "gpu_decode": (
        ["--shape=tiny", "--device=cpu", "--contexts=16", "--output-tokens=4", "--rounds=1"],
        "share_of_floor",
    ),
    "nano_bench": (
        ["--shape=tiny", "--device=cpu", "--sequences=4", "--tokens", "4", "8", "--rounds=1"],
        "tok_s",
    ),
}
SHORT = ["--input-tokens", "8", "16", "--output-tokens=4", "--rounds=1", "--threads=1"]
WITH_PROCESSES = {
    "serving_throughput": (["MODEL", "--peers", "--concurrency", "1", "2", *SHORT], "mizzen_tok_s"),
    "serving_http": (["MODEL", "--peers", "--concurrency", "2", *SHORT], "ttft_p50_ms"),
    "loan_latency": (
        ["MODEL", "--requests=2", "--rounds=2", "--sample-words=8", "--threads=1"],
        "p95_over_idle",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.mark.parametrize("script", [*IN_PROCESS, *WITH_PROCESSES])
def test_a_script_prints_a_json_line_per_row_and_a_table(
    script: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked, column = (IN_PROCESS | WITH_PROCESSES)[script]
    arguments = [str(model) if word == "MODEL" else word for word in asked]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    try:
        importlib.import_module(f"benchmarks.{script}").main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert rows[-1][column]
    assert column in printed.splitlines()[-len(rows) - 1]  # the table's first line


def test_a_benchmark_that_trains_draws_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["train_rl", "--methods=grpo", "--seeds=1", "--steps=2", "--plot"]
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "rl.svg")])
    train_rl.main()
    assert "of 1 runs" in capsys.readouterr().out
    assert ">reward</text>" in (tmp_path / "rl.svg").read_text()
    monkeypatch.setattr(sys, "argv", [*asked, str(tmp_path / "rl.pdf")])
    with pytest.raises(SystemExit):
        train_rl.main()
    assert "rl.pdf ends in neither .svg nor .png" in capsys.readouterr().err


def test_the_gateway_is_measured_before_a_dummy_backend_also_without_its_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gateway_latency", "--peers", "--requests=160"])
    gateway_latency.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["short", "100KB"]
    assert all(row["requests_per_s_per_core"]["mizzen"] > 0 for row in rows)
    assert all("p99_added_ms" in row["added"]["mizzen"] for row in rows)


def test_the_figures_to_reach_are_ratios_and_unknown_without_their_peer() -> None:
    added = {"mizzen": {"p99_added_ms": 3.0}, "vllm-router": {"p99_added_ms": 2.0}}
    rates = {"mizzen": 800, "litellm": 100}
    assert gateway_latency.ratios(added, rates) == {
        "per_core_over_litellm": 8.0,
        "p99_over_vllm_router": 1.5,
    }
    alone = gateway_latency.ratios({"mizzen": {"p99_added_ms": 3.0}}, {"mizzen": 800})
    assert set(alone.values()) == {None}


def test_a_tied_table_is_read_in_a_step_and_one_that_only_looks_up_is_not(tmp_path: Path) -> None:
    tied = write_tiny_model(tmp_path / "tied")
    assert step_weight_bytes(tied) == weight_bytes(tied)
    apart = tmp_path / "apart"
    write_random_model(apart, SHAPES["tiny"])
    assert step_weight_bytes(apart) == weight_bytes(apart) - 2 * 512 * 64
    assert step_weight_bytes(apart, "int8") < 0.51 * step_weight_bytes(apart)
    assert kv_token_bytes(apart) == 2 * 2 * 2 * 2 * 16  # K and V, bytes, layers, heads, head size


def test_a_random_checkpoint_is_one_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds

    write_random_model(tmp_path, SHAPES["tiny"])
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def test_a_peers_extras_and_the_packages_that_break_it_are_left_out() -> None:
    listed = [
        'torch==2.13.0+cpu; platform_machine == "x86_64"',
        'torchvision; platform_machine != "riscv64"',
        "numpy",
        'compressed-tensors==0.17.0; python_version > "3.10"',
        'scipy; extra == "audio"',
    ]
    assert wanted_requirements(listed) == ["numpy", listed[3]]
