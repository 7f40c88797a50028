"""An adapter is loaded beside the weights it was trained beside, wherever they lie."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from mizzen.operator.runtimes import AdapterRefusedError, HttpRuntimes
from mizzen.runtime.model.lora.files import CONFIG_FILE, WEIGHTS_FILE
from mizzen.runtime.server import service as service_module
from mizzen.runtime.train.digest import ARTIFACT_FILE, base_weights_of, mark_weights
from tests.fixtures.runtime_server import Running, running_tiny_model
from tests.fixtures.train_runs import run, write_job

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def adapter(root: Path) -> Path:
    """An adapter as a job publishes it."""
    suites: dict[str, Any] = {"suites": []}
    job = write_job(root / "job", hyperparameters={"max_steps": 1}, evaluation=suites)
    assert run(job) == 0
    (folder,) = job.artifacts
    assert base_weights_of(folder) == mark_weights(root / "job" / "model")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(root: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(root, quantization="int8", adapter_root=[root]) as running:
        yield running


@pytest.fixture(scope="module")
def other(root: Path, running: Running) -> Path:
    """The served model with other weights."""
    folder = root / "other"
    copy_files(root / "tiny", folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: t / 2 for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def copy_files(source: Path, folder: Path, *names: str) -> None:
    """Copy these files of a folder, or all, into a new one."""
    folder.mkdir()
    for name in names or [file.name for file in source.iterdir()]:
        (folder / name).write_bytes((source / name).read_bytes())


async def load(running: Running, path: Path) -> httpx.Response:
    body = {"parameters": {"path": str(path)}}
    return await running.http.post("/v2/repository/models/support/load", json=body)


async def test_the_same_weights_in_another_folder_rounded_as_they_are_read_are_its_base(
    running: Running, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def mark(path: Path) -> str:
        read.append(path)
        return mark_weights(path)

    monkeypatch.setattr(service_module, "mark_weights", mark)
    for _ in range(2):
        assert (await load(running, adapter)).status_code == 200
    assert read == [running.service.weights]


async def test_other_weights_are_not_its_base_until_they_are_swapped_back(
    running: Running, adapter: Path, other: Path
) -> None:
    service = running.service
    served = service.weights
    await service.load_weights(other)
    refused = await load(running, adapter)
    assert refused.status_code == 400
    assert refused.json()["error"] == (
        f"The adapter was trained beside weights with the digest {mark_weights(served)}, and "
        f"those that are served have {mark_weights(other)}. Serve the base model that it was "
        "trained on, or train it again on this one. Without its artifact.json, in a folder of its "
        "own, it is loaded beside any."
    )
    await service.load_weights(served)
    assert (await load(running, adapter)).status_code == 200


async def test_a_swap_withdraws_the_adapters_of_other_weights_alone(
    running: Running, adapter: Path, other: Path, root: Path
) -> None:
    served = running.service.weights
    silent = root / "silent"
    copy_files(adapter, silent, CONFIG_FILE, WEIGHTS_FILE)
    body = {"parameters": {"path": str(silent)}}
    assert (await load(running, adapter)).status_code == 200
    await running.http.post("/v2/repository/models/silent/load", json=body)
    try:
        answer = await running.admin.post("/weights", json={"path": str(other)})
        assert answer.status_code == 200
        told = (await running.admin.get("/adapters")).json()
        assert [one["name"] for one in told["adapters"]] == ["silent"]
        (error,) = told["errors"]
        assert error["name"] == "support"
        assert "trained beside weights with the digest" in error["message"]
        asked = {"model": "support", "prompt": "a", "max_tokens": 1}
        assert (await running.http.post("/v1/completions", json=asked)).status_code == 404
    finally:
        await running.admin.post("/weights", json={"path": str(served)})
    assert (await load(running, adapter)).status_code == 200
    assert (await running.admin.get("/adapters")).json()["errors"] == []


async def test_the_operator_is_told_that_trying_again_does_not_help(
    running: Running, adapter: Path, other: Path, tmp_path: Path
) -> None:
    served = running.service.weights
    runtimes = HttpRuntimes(tmp_path / "token", http_port=running.server.ports.http)
    await running.service.load_weights(other)
    try:
        with pytest.raises(AdapterRefusedError, match="trained beside weights with the digest"):
            await runtimes.load_adapter("127.0.0.1", "support", path=str(adapter), digest=None)
    finally:
        await runtimes.close()
        await running.service.load_weights(served)


@pytest.mark.parametrize("says", [None, "{", "[]", "{}", '{"baseWeights": 1}'])
async def test_an_adapter_that_does_not_say_is_loaded_as_ever(
    running: Running, adapter: Path, root: Path, says: str | None
) -> None:
    folder = root / f"foreign-{(says or 'silent').encode().hex()}"
    copy_files(adapter, folder, CONFIG_FILE, WEIGHTS_FILE)
    if says is not None:
        (folder / ARTIFACT_FILE).write_text(says)
    assert base_weights_of(folder) is None
    assert (await load(running, folder)).status_code == 200


async def test_weights_whose_files_are_gone_are_nobodys_base(
    running: Running, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.service, "weights", Path("/gone"))
    monkeypatch.setattr(running.service, "_mark", None)
    refused = await load(running, adapter)
    assert refused.status_code == 400
    assert "their files in /gone cannot be read (FileNotFoundError)" in refused.json()["error"]
