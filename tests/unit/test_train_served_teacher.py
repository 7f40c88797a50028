"""A teacher that a deployment serves: asked in its idle moments, over HTTP."""

import asyncio
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.errors import (
    JobConfigError,
    TeacherNotFiniteError,
    TeacherUnavailableError,
)
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.policy import log_probs_by_sample
from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.teacher import ServedTeacher
from mizzen.runtime.train.workers import Workers
from tests.fixtures.runtime_server import Running, running_tiny_model
from tests.fixtures.train_runs import (
    assert_same_curve,
    exit_codes,
    read_curve,
    run,
    start_workers,
    write_job,
)

SAMPLE = Sample(np.arange(20, 40, dtype=np.int32), np.arange(20) >= 12)


def around(model: Path, **fields: Any) -> Any:
    return SimpleNamespace(
        **{
            "tokenizer": Tokenizer.load(model),
            "stop": StopFlag(),
            "teacher_api_key": None,
            "workers": Workers(),
            "device": torch.device("cpu"),
            **fields,
        }
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def teacher(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    folder = tmp_path_factory.mktemp("teacher")
    (folder / "keys").write_text("mz-1\n")
    async with running_tiny_model(folder, api_key_file=str(folder / "keys")) as server:
        yield server


def model_of(server: Running) -> Path:
    return Path(server.service.config.model_path)


@pytest.mark.asyncio(loop_scope="module")
async def test_its_log_probs_are_those_of_the_same_model_here(teacher: Running) -> None:
    where = ServedModel(url=teacher.url, model="tiny")
    asked = ServedTeacher(where, around(model_of(teacher), teacher_api_key="mz-1"))
    (found_N,) = await asyncio.to_thread(asked.log_probs, [SAMPLE])
    decoder = load_decoder(model_of(teacher), dtype=torch.float32)
    (wanted_N,) = log_probs_by_sample(decoder, [SAMPLE], None, at_once=AtOnce(1))
    np.testing.assert_allclose(found_N, wanted_N, atol=1e-4)


@pytest.mark.asyncio(loop_scope="module")
async def test_who_brings_no_key_is_told_what_the_deployment_said(teacher: Running) -> None:
    asked = ServedTeacher(ServedModel(url=teacher.url, model="tiny"), around(model_of(teacher)))
    with pytest.raises(JobConfigError, match="API key"):
        await asyncio.to_thread(asked.log_probs, [SAMPLE])


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.asyncio(loop_scope="module")
async def test_a_job_learns_from_a_deployment(
    teacher: Running, tmp_path: Path, on_policy: bool
) -> None:
    job = write_job(
        tmp_path,
        method="distill",
        distill={
            "served": {"url": teacher.url, "model": "tiny"},
            "samples": 8,
            "on_policy": on_policy,
            "max_new_tokens": 4,
        },
        hyperparameters={"max_steps": 2},
    )
    assert await asyncio.to_thread(run, job, teacher_api_key="mz-1") == 0
    assert job.artifacts
    notes = list(job.checkpoints.glob("notes/part-*"))
    assert len(notes) == (0 if on_policy else 1)
    if notes:
        assert {tensor.shape[1] for tensor in load_file(notes[0]).values()} == {8}


GROUPS = {"two copies": (2, 1), "two ranks": (2, 2), "two copies of two ranks": (4, 2)}


@pytest.mark.parametrize("on_policy", [False, True], ids=["noted", "on policy"])
@pytest.mark.parametrize(("workers", "tensor"), GROUPS.values(), ids=GROUPS)
@pytest.mark.asyncio(loop_scope="module")
async def test_several_workers_learn_from_a_deployment_as_one_does(
    teacher: Running, tmp_path: Path, workers: int, tensor: int, on_policy: bool
) -> None:
    asked = {
        "method": "distill",
        "distill": {
            "served": {"url": teacher.url, "model": "tiny"},
            "samples": 8,
            "on_policy": on_policy,
            "max_new_tokens": 4,
        },
        # Otherwise the student would be the teacher, and have nothing to learn.
        "base_model": str(write_tiny_model(tmp_path / "base", width=96, heads=6)),
        "hyperparameters": {"max_steps": 3, "learning_rate": 0.001},
    }
    alone = write_job(tmp_path / "alone", **asked)
    assert await asyncio.to_thread(run, alone, teacher_api_key="mz-1") == 0
    job = write_job(tmp_path / "job", **asked, parallelism={"tensor": tensor})

    def run_all() -> list[int | None]:
        return exit_codes(start_workers(job, workers, teacher_api_key="mz-1"))

    assert await asyncio.to_thread(run_all) == [0] * workers
    found, expected = read_curve(job), read_curve(alone)
    assert len(found) == 3
    if on_policy:  # its loss is nothing but rounding
        found = [replace(record, loss=record.measured["kl"]) for record in found]
        expected = [replace(record, loss=record.measured["kl"]) for record in expected]
    assert_same_curve(found, expected)
    notes = [[load_file(path) for path in sorted(one.checkpoints.glob("notes/*"))]
             for one in (job, alone)]  # fmt: skip
    assert len(notes[0]) == len(notes[1]) == (0 if on_policy else 1)
    for ours, theirs in zip(*notes, strict=True):
        assert all(torch.equal(ours[name], drawn) for name, drawn in theirs.items())


@pytest.mark.asyncio(loop_scope="module")
async def test_one_with_other_tokens_is_refused_with_both_digests(
    teacher: Running, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base")
    tokenizer = RustTokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|more|>", special=True)])
    tokenizer.save(str(base / "tokenizer.json"))
    served = {"url": teacher.url, "model": "tiny"}
    job = write_job(tmp_path, base_model=str(base), method="distill", distill={"served": served})
    assert await asyncio.to_thread(run, job, teacher_api_key="mz-1") == 42
    assert job.last_word["reason"] == "TeacherTokenizerDiffers"
    assert len(set(re.findall(r"[0-9a-f]{64}", job.last_word["message"]))) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_one_without_finite_numbers_ends_the_job_at_once(
    teacher: Running, tmp_path: Path
) -> None:
    served = {"url": teacher.url, "model": "tiny"}
    job = write_job(tmp_path, method="distill", distill={"served": served})
    sane = Path(teacher.service.config.model_path)
    await teacher.service.load_weights(overflowing(tmp_path / "wild"))
    assert await asyncio.to_thread(run, job, teacher_api_key="mz-1") == 42
    await teacher.service.load_weights(sane)
    assert job.last_word["reason"] == "TeacherNotFinite"
    assert "The teacher tiny has no finite numbers for a text" in job.last_word["message"]


def overflowing(folder: Path) -> Path:
    """Write the same model with scales that are too large for their products."""
    path = write_tiny_model(folder) / "model.safetensors"
    tensors = load_file(path)
    save_file({n: t * (1e38 if "norm" in n else 1.0) for n, t in tensors.items()}, path)
    return folder


class Answers(BaseHTTPRequestHandler):
    """Says the same to everybody, and counts."""

    status, body, asked = 200, b"{}", 0

    def do_POST(self) -> None:
        type(self).asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[tuple[type[Answers], str]]:
    kind = type("Own", (Answers,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield kind, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_busy_teacher_is_asked_again_and_then_named(
    answers: tuple[type[Answers], str], tiny: Path
) -> None:
    kind, url = answers
    kind.status = 429
    asked = ServedTeacher(ServedModel(url=url, model="big"), around(tiny), retries=1)
    with pytest.raises(TeacherUnavailableError, match="big had no idle moment"):
        asked.log_probs([SAMPLE])
    assert kind.asked == 2


def test_one_that_has_no_numbers_for_a_text_is_not_asked_for_it_again(
    answers: tuple[type[Answers], str], tiny: Path
) -> None:
    kind, url = answers
    kind.status, kind.body = 500, b'{"error": {"code": "generation_failed"}}'
    asked = ServedTeacher(ServedModel(url=url, model="big"), around(tiny), retries=1)
    with pytest.raises(TeacherNotFiniteError, match="big has no finite numbers"):
        asked.log_probs([SAMPLE])
    assert kind.asked == 1


@pytest.mark.parametrize("body", [b"{}", b"[]", b"<html>", b'{"vocabulary": "a", "choices": []}'])
def test_a_server_that_names_no_vocabulary_is_no_teacher(
    answers: tuple[type[Answers], str], tiny: Path, body: bytes
) -> None:
    kind, url = answers
    kind.body = body
    asked = ServedTeacher(ServedModel(url=url, model="big"), around(tiny), retries=1)
    with pytest.raises(JobConfigError, match="which vocabulary big has"):
        asked.log_probs([SAMPLE])


def test_one_that_is_away_is_told_apart(tiny: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    asked = ServedTeacher(ServedModel(url=url, model="big"), around(tiny), retries=1)
    with pytest.raises(TeacherUnavailableError, match="cannot be reached"):
        asked.log_probs([SAMPLE])


def test_a_job_that_waits_for_its_teacher_can_yield(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        surroundings = around(tiny)
        asked = ServedTeacher(ServedModel(url=url, model="big"), surroundings, retries=0)
        connections = []

        def accept_and_stop() -> None:
            connections.append(silent.accept())  # kept, so that it stays open
            surroundings.stop.ask()

        threading.Thread(target=accept_and_stop).start()
        with pytest.raises(YieldRequested):
            asked.log_probs([SAMPLE])
        connections[0][0].close()
