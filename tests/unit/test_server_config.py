"""The settings of `mizzen serve`: flags over environment over defaults."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from mizzen.runtime.config import ServeConfig


def parse(*args: str) -> ServeConfig:
    return CliApp.run(ServeConfig, cli_args=list(args))


def test_a_path_alone_is_enough() -> None:
    config = parse("/models/smollm2")
    assert config.served_name == "smollm2"
    assert (config.port, config.grpc_port, config.admin_port) == (8000, 8001, 8002)
    assert config.adapter_roots == (Path("/mnt/pvc"),)


@pytest.mark.parametrize(
    ("given", "path", "name"),
    [
        ("/m/tiny.Q4_1.gguf", "/m/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("file:///m/a%20b", "/m/a b", "a b"),
        ("/m/tiny/", "/m/tiny", "tiny"),
    ],
)
def test_a_model_is_a_path_or_a_file_address(given: str, path: str, name: str) -> None:
    config = parse(given)
    assert config.model_path == Path(path)
    assert config.served_name == name


def test_the_operator_s_flags_are_understood() -> None:
    config = parse(
        *("/mnt/pvc/models/smollm2", "--served-model-name", "smollm2"),
        *("--tensor-parallel-size", "2", "--pipeline-parallel-size", "3"),
        *("--dtype", "bfloat16", "--device", "cpu"),
        *("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "256"),
        *("--kv-cache-gib", "0.5", "--block-size", "16", "--drain-seconds", "60"),
        *("--admin-token-file", "/var/run/mizzen/admin/token"),
        *("--adapters-file", "/etc/mizzen/adapters/adapters.json"),
        *("--max-loras", "4", "--max-lora-rank", "32"),
        *("--adapter-root", "/a", "--adapter-root", "/b"),
    )
    engine = config.engine_config()
    assert engine.model == Path("/mnt/pvc/models/smollm2")
    assert (engine.tensor_parallel_size, engine.pipeline_parallel_size, engine.ranks) == (2, 3, 6)
    assert (engine.dtype, engine.device) == ("bfloat16", "cpu")
    assert (engine.max_model_len, engine.max_num_seqs) == (2048, 8)
    assert (engine.max_num_batched_tokens, engine.kv_cache_gib) == (256, 0.5)
    assert (engine.max_loras, engine.max_lora_rank) == (4, 32)
    assert config.adapter_roots == (Path("/mnt/pvc"), Path("/a"), Path("/b"))
    assert config.admin_token_file == Path("/var/run/mizzen/admin/token")


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIZZEN_SERVE_PORT", "9000")
    monkeypatch.setenv("MIZZEN_SERVE_MAX_LORAS", "3")
    config = parse("/m", "--port", "9001")
    assert (config.port, config.max_loras) == (9001, 3)


@pytest.mark.parametrize("flag", ["--port=70000", "--max-model-len=0", "--dtype=int3"])
def test_a_value_out_of_range_is_refused(flag: str) -> None:
    with pytest.raises(ValidationError):
        parse("/m", flag)


def test_ranks_that_do_not_spread_evenly_over_pods_are_refused() -> None:
    group = ("--master-addr=a", "--admin-token-file=t", "--nnodes=2")
    assert parse("/m", *group, "--pipeline-parallel-size=2").nnodes == 2
    with pytest.raises(ValidationError, match="--tensor-parallel-size times --pipeline-parallel"):
        parse("/m", *group, "--tensor-parallel-size=3")
