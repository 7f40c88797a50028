"""Sleep, wake and new weights under a running server."""

import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hack.tiny_model import write_tiny_model
from tests.fixtures.runtime_server import Running, begin_answer, running_tiny_model

BODY = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as running:
        yield running


async def text(running: Running, **fields: Any) -> str:
    answer = await running.http.post("/v1/completions", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def ready(running: Running) -> int:
    return (await running.admin.get("/readyz")).status_code


def other_weights(folder: Path, **shape: int) -> Path:
    write_tiny_model(folder, **shape)
    file = folder / "model.safetensors"
    torch.manual_seed(7)
    changed = {name: torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    return folder


def cut_weights(folder: Path) -> Path:
    """Write a model whose last norm is half as wide as its config.json says."""
    file = write_tiny_model(folder) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:32].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


async def test_a_sleeping_replica_holds_no_weights_and_wakes_as_it_was(running: Running) -> None:
    before = await text(running)
    runner = running.service.engine._ranks._runner
    held = [weakref.ref(part) for part in (runner._decoder, runner._cache)]
    stream = await begin_answer(running, BODY | {"max_tokens": 100})
    asked = await running.admin.post("/sleep", json={"timeoutSeconds": 200})
    assert asked.json() == {"asleep": True}
    assert len(await stream) > 0  # what ran was finished first
    assert [part() for part in held] == [None, None]
    assert await ready(running) == 503
    assert 'phase="asleep"' in (await running.admin.get("/metrics")).text
    refused = await running.http.post("/v1/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "asleep")
    assert "Retry-After" in refused.headers
    model = str(running.service.config.model_path)
    too_early = await running.admin.post("/weights", json={"path": model})
    assert too_early.status_code == 400
    assert "Wake it" in too_early.json()["error"]
    assert (await running.admin.post("/sleep")).status_code == 200  # asked for again
    assert (await running.admin.post("/wake")).json() == {"asleep": False}
    assert await ready(running) == 200
    assert await text(running) == before


async def test_new_weights_answer_and_old_ones_leave_nothing_in_the_cache(
    running: Running, tmp_path: Path
) -> None:
    prompt = "The same long beginning of every prompt. " * 4
    before = await text(running, prompt=prompt)
    path = other_weights(tmp_path / "new")
    running_on = await begin_answer(running, BODY | {"max_tokens": 200})
    answer = await running.admin.post("/weights", json={"path": str(path)})
    assert answer.json() == {"path": str(path)}
    assert len(await running_on) > 0
    hits = running.service.engine.stats().prefix_hits
    after = await text(running, prompt=prompt)
    assert running.service.engine.stats().prefix_hits == hits
    assert after != before
    async with running_tiny_model(tmp_path / "alone", model=str(path)) as fresh:
        fresh_answer = await fresh.http.post(
            "/v1/completions", json=BODY | {"prompt": prompt, "model": "new"}
        )
        assert after == fresh_answer.json()["choices"][0]["text"]


async def test_weights_that_cannot_be_used_change_nothing(running: Running, tmp_path: Path) -> None:
    before = await text(running)
    (tmp_path / "empty").mkdir()
    bad = {
        str(other_weights(tmp_path / "wide", width=128)): "another model",
        str(cut_weights(tmp_path / "cut")): "has shape",
        str(tmp_path / "empty"): "config.json",
        str(tmp_path / "nowhere"): "not a directory",
    }
    for path, words in bad.items():
        answer = await running.admin.post("/weights", json={"path": path})
        assert answer.status_code == 400
        assert words in answer.json()["error"]
    assert (await running.admin.post("/weights", json={"path": "/"})).status_code == 403
    assert await text(running) == before


async def test_two_ranks_sleep_wake_and_swap_together(tmp_path: Path) -> None:
    new, cut = other_weights(tmp_path / "new"), cut_weights(tmp_path / "cut")
    settings = {"tensor_parallel_size": 2, "adapter_root": [tmp_path]}
    async with running_tiny_model(tmp_path, **settings) as running:
        before = await text(running)
        for call in ("sleep", "wake"):
            assert (await running.admin.post(f"/{call}")).status_code == 200
        assert await text(running) == before
        assert (await running.admin.post("/weights", json={"path": str(cut)})).status_code == 400
        assert await text(running) == before
        assert (await running.admin.post("/weights", json={"path": str(new)})).status_code == 200
        after = await text(running)
    async with running_tiny_model(tmp_path / "alone", model=str(new)) as fresh:
        assert after == await text(fresh, model="new")
