"""`mizzen plan` of a model that is on a hub: its config.json is fetched and nothing else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mizzen.cli.commands import app
from tests.fixtures.hub_server import HubServer, running_hub

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "max_position_embeddings": 256, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": 512,
}  # fmt: skip
FILES = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": b"weights"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def plan(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.output


def test_of_a_model_on_a_hub_only_the_configuration_is_fetched(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add("org/tiny", FILES)
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    code, said = plan("hf://org/tiny", "--gpu", "t4")
    assert (code, said) == plan(str(tmp_path), "--gpu", "t4")
    assert code == 0
    assert hub.count("config.json") >= 1
    assert hub.count(".safetensors") == 0


REFUSED = {
    "a repository that is not there": ("hf://org/absent", "org/absent"),
    "an address that is none": ("hf://nonsense", "write hf://ORG/NAME"),
    "weights that are one file": ("hf://org/packed", "is a .gguf file. Fetch it"),
    "weights that are pickles": ("hf://org/pickled", "Convert them to safetensors"),
}


@pytest.mark.parametrize(("source", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_said(hub: HubServer, source: str, says: str) -> None:
    hub.add("org/packed", {"tiny.gguf": b"GGUF"})
    hub.add("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    code, said = plan(source)
    assert code == 2
    assert says in said


def test_without_the_packages_that_ask_a_hub_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mizzen.runtime.sources.hub", None)
    code, said = plan("hf://org/tiny")
    assert code == 2
    assert "pip install 'mizzen[runtime]'" in said
