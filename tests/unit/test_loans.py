"""A training job on the weights of a replica that serves: while nobody asks, and only then."""

import asyncio
import gc
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.profiler import ProfilerActivity, profile

from mizzen.runtime.engine import loan
from mizzen.runtime.engine.api import LoanState
from mizzen.runtime.engine.errors import EngineDeadError
from mizzen.runtime.engine.loan import Loan
from mizzen.runtime.train import loan_memory
from mizzen.runtime.train.adaptation import build_lora
from mizzen.runtime.train.config import load_config
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.surroundings import Resident
from tests.fixtures import train_runs
from tests.fixtures.runtime_server import Running, begin_answer, eventually, running_tiny_model
from tests.fixtures.train_runs import Job, assert_same_curve, read_curve

BODY = {"model": "tiny", "prompt": "Once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
LONG = {"max_steps": 100_000}
WAIT_S = 400.0


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as running:
        yield running


def write_loan(running: Running, name: str = "lent", **overrides: Any) -> Job:
    model = running.service.config.model_path
    return train_runs.write_job(model.parent / name, base_model=str(model), **overrides)


async def lend(running: Running, lent: Job, **fields: Any) -> Any:
    document = json.loads(lent.config_path.read_text()) | fields
    return await running.admin.put("/loan", json=document)


async def look(running: Running) -> dict[str, Any]:
    return dict((await running.admin.get("/loan")).json()["loan"])


async def wait_for_end(running: Running) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while (state := await look(running))["exitCode"] is None:  # noqa: ASYNC110 - of another thread
            await asyncio.sleep(0.1)
    return state


async def begin(running: Running, job: Job, *, step: int = 2) -> None:
    """Lend the weights and wait until the job has made some steps."""
    answer = await lend(running, job)
    assert answer.status_code == 202, answer.text
    await until_step(running, job, step)


async def until_step(running: Running, job: Job, step: int) -> None:
    """Wait for a step as an operator does: a job that nobody asks about any more ends."""
    async with asyncio.timeout(WAIT_S):
        while len(read_curve(job)) < step:
            await look(running)
            await asyncio.sleep(0.1)  # the job gets only what nobody else wants of the processor


async def text(running: Running, **fields: Any) -> str:
    answer = await running.http.post("/v1/completions", json=BODY | fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


async def test_a_loan_learns_what_a_trainer_with_a_base_of_its_own_learns(
    running: Running, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"adaptation": {"dropout": 0.1}}
    lent, own = write_loan(running, **settings), train_runs.write_job(tmp_path / "own", **settings)
    assert (await running.admin.get("/loan")).json()["loan"] is None
    await lend(running, lent)
    state = await wait_for_end(running)
    assert (state["exitCode"], state["message"]) == (0, "")
    assert await asyncio.to_thread(train_runs.run, own) == 0
    assert_same_curve(read_curve(lent), read_curve(own))
    ours, theirs = state["progress"], own.last_word
    assert ours["phase"] == "Succeeded"
    assert ours["evaluation"][0]["candidate"] == pytest.approx(
        theirs["evaluation"][0]["candidate"], rel=1e-3
    )
    (artifact,) = lent.artifacts
    assert ours["artifact"]["path"] == str(artifact)
    loaded = await running.http.post(
        "/v2/repository/models/new/load", json={"parameters": {"path": str(artifact)}}
    )
    assert loaded.status_code == 200, loaded.text
    assert await text(running, model="new") != await text(running)
    again = await lend(running, lent)
    assert again.json()["loan"]["exitCode"] == 0, "the same generation is not begun twice"


async def test_a_job_stands_still_while_a_request_runs_and_goes_on_after_it(
    running: Running,
) -> None:
    alone = await text(running)
    job = write_loan(running, hyperparameters=LONG)
    await begin(running, job)
    stream = await begin_answer(running, BODY | {"max_tokens": 100})
    # One step may be beyond its last look up.
    before = len(read_curve(job))
    assert await stream == alone[: len(await stream)]
    assert await text(running) == alone, "the weights are as they were"
    assert len(read_curve(job)) >= before
    await until_step(running, job, before + 4)
    assert (await running.admin.get("/readyz")).status_code == 200
    metrics = (await running.admin.get("/metrics")).text
    assert 'mizzen:loans_running{engine="0",model_name="tiny"} 1.0' in metrics


async def test_a_step_is_what_it_would_have_been_though_requests_come_in_the_middle(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    plain = Loan._give_way

    def give_way(self: Loan) -> None:
        nonlocal looks
        looks += 1
        answers = iter([True, True] if looks % 9 == 0 else [])
        self._is_wanted = lambda: next(answers, False)
        plain(self)

    undisturbed = write_loan(running, "undisturbed")
    await lend(running, undisturbed)
    await wait_for_end(running)
    monkeypatch.setattr(Loan, "_give_way", give_way)
    disturbed = write_loan(running, "disturbed")
    await lend(running, disturbed)
    assert (await wait_for_end(running))["exitCode"] == 0
    assert looks > 400, "it looks up at every linear, both ways"
    assert disturbed.curve == undisturbed.curve


async def test_a_job_has_the_lowest_priority_and_the_server_its_own(running: Running) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    await begin(running, write_loan(running, hyperparameters=LONG))
    thread = running.service.engine._lender._loan._training
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == 19
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


async def test_what_a_job_held_is_collected_at_the_priority_of_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection stops every thread for as long as its own takes, a request's among them."""
    collect, priorities = gc.collect, []

    def watched() -> int:
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return collect()

    monkeypatch.setattr(loan.gc, "collect", watched)
    await lend(running, write_loan(running))
    assert (await wait_for_end(running))["exitCode"] == 0
    assert priorities == [os.getpriority(os.PRIO_PROCESS, 0)]


async def test_a_job_that_is_asked_back_commits_and_goes_on_elsewhere(tmp_path: Path) -> None:
    settings = {"hyperparameters": {"max_steps": 80}, "checkpoint": {"every_steps": 1000}}
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as first:
        job = write_loan(first, **settings)
        await begin(first, job)
        assert (await first.admin.delete("/loan")).status_code == 202
        state = await wait_for_end(first)
        assert state["exitCode"] == 75
        assert state["endedAt"] > "2026"
        assert state["progress"]["checkpoint"]["step"] == state["progress"]["step"]
        whole = write_loan(first, "whole", **settings)
        await lend(first, whole)
        assert (await wait_for_end(first))["exitCode"] == 0
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as second:
        await lend(second, job, generation=2)
        assert (await wait_for_end(second))["exitCode"] == 0
    assert job.curve == whole.curve
    assert job.weights_digest == whole.weights_digest


async def test_a_replica_that_dies_costs_only_what_was_not_committed(tmp_path: Path) -> None:
    place: dict[str, Any] = {"adapter_root": [tmp_path], "own_process": True}
    with pytest.raises(EngineDeadError):
        async with running_tiny_model(tmp_path, **place) as first:
            job = write_loan(first, hyperparameters={"max_steps": 30})
            await begin(first, job, step=5)
            assert first.process is not None
            first.process.kill()
            await first.task
    steps = len(read_curve(job))
    committed = sorted(int(path.name[5:]) for path in job.checkpoints.glob("step-*"))
    assert steps - 2 <= committed[-1] <= steps, "a commit after every second step"
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as second:
        await lend(second, job, generation=2)
        state = await wait_for_end(second)
        assert state["exitCode"] == 0
        whole = write_loan(second, "whole", hyperparameters={"max_steps": 30})
        await lend(second, whole)
        await wait_for_end(second)
    assert_same_curve(read_curve(job), read_curve(whole))


@pytest.mark.parametrize("how", ["/sleep", "/weights", "/drain"])
async def test_whoever_takes_the_weights_away_ends_the_loan_first(
    running: Running, how: str
) -> None:
    job = write_loan(running, hyperparameters=LONG)
    await begin(running, job)
    held = weakref.ref(running.service.engine._ranks._runner._decoder)
    model = str(running.service.config.model_path)
    body = {"path": model} if how == "/weights" else {"timeoutSeconds": 100}
    assert (await running.admin.post(how, json=body)).status_code < 300
    state = await wait_for_end(running)
    assert state["exitCode"] == 75
    assert state["progress"]["checkpoint"]["step"] == state["progress"]["step"]
    if how != "/drain":
        gc.collect()
        assert held() is None, "the job holds no weights that are not served"


async def test_a_loan_that_a_drain_overtakes_ends_as_well(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = running.service.engine._lender
    has_begun, may_go_on, lend_now = threading.Event(), threading.Event(), lender.lend

    def lend_late(*asked: Any) -> LoanState:
        has_begun.set()
        assert may_go_on.wait(WAIT_S)
        return lend_now(*asked)

    monkeypatch.setattr(lender, "lend", lend_late)
    lending = asyncio.create_task(lend(running, write_loan(running, hyperparameters=LONG)))
    await eventually(has_begun.is_set)
    await running.service.engine.drain(0)
    may_go_on.set()
    assert (await lending).status_code == 202
    assert (await wait_for_end(running))["exitCode"] == 75


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"method": "wish"}, "method"),
    "another method": ({"method": "dpo", "evaluation": {"suites": []}}, "take sft"),
    "whole weights that learn": (
        {"adaptation": {"type": "full"}, "output": {"kind": "model"}},
        "take lora",
    ),
    "several workers": ({"workers": 2}, "set workers to 1"),
    "an upload": ({"output": {"s3": "s3://bucket/key"}}, "leave output.s3 out"),
    "a judge": (
        {
            "evaluation": {
                "suites": [{"name": "wins", "type": "winRate"}],
                "judge": {"url": "http://x", "model": "m"},
            }
        },
        "take other suites",
    ),
    "results elsewhere": ({"output": {"directory": "/elsewhere"}}, "on the claim of the model"),
    "checkpoints elsewhere": ({"checkpoint": {"directory": "/etc/x"}}, "/etc/x is not below"),
    "data elsewhere": (
        {"datasets": [{"name": "d", "path": "/etc/passwd"}]},
        "/etc/passwd is not below",
    ),
}


@pytest.mark.parametrize(("overrides", "says"), REFUSALS.values(), ids=REFUSALS)
async def test_a_job_that_cannot_be_lent_to_is_told_what_to_change(
    running: Running, overrides: dict[str, Any], says: str
) -> None:
    model = running.service.config.model_path
    job = train_runs.write_job(model.parent / "lent", **{"base_model": str(model), **overrides})
    answer = await lend(running, job)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert (await running.admin.get("/loan")).json()["loan"] is None


async def test_weights_in_few_bits_are_not_lent(tmp_path: Path) -> None:
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path], quantization="int8") as lender:
        answer = await lend(lender, write_loan(lender))
    assert answer.status_code == 400
    assert "Serve them without quantization" in answer.json()["error"]


async def test_weights_that_are_lent_already_are_not_lent_again(running: Running) -> None:
    job = write_loan(running, hyperparameters=LONG)
    await begin(running, job)
    answer = await lend(running, write_loan(running, "other"), job="test/other")
    assert answer.status_code == 429
    assert "lent to test/job" in answer.json()["error"]
    await running.admin.delete("/loan")
    assert (await wait_for_end(running))["exitCode"] == 75
    after = await lend(running, write_loan(running, "other"), job="test/other")
    assert after.json()["loan"]["job"] == "test/other"
    await wait_for_end(running)


async def test_weights_of_another_base_are_not_lent(running: Running) -> None:
    answer = await lend(running, write_loan(running), base_model="/models/other")
    assert answer.status_code == 429
    assert "The job's base is /models/other" in answer.json()["error"]


async def test_a_sleeping_replica_lends_nothing(running: Running) -> None:
    await running.admin.post("/sleep")
    answer = await lend(running, write_loan(running))
    assert (answer.status_code, "sleeps" in answer.json()["error"]) == (503, True)


async def test_a_job_that_nobody_asks_about_any_more_commits_and_ends(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_loan(running, hyperparameters=LONG)
    await begin(running, job)
    monkeypatch.setattr(loan, "PATIENCE_S", 0.0)
    await eventually(lambda: not running.service.engine._lender.is_lent)
    state = await look(running)
    assert state["exitCode"] == 75
    assert state["progress"]["checkpoint"]["step"] == state["progress"]["step"]


async def test_a_fault_of_ours_is_told_and_leaves_the_replica_at_work(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("mizzen.runtime.engine.loan.run_loan", fail)
    await lend(running, write_loan(running))
    state = await wait_for_end(running)
    assert (state["exitCode"], state["message"]) == (1, "ZeroDivisionError: by zero")
    assert len(await text(running, max_tokens=2)) > 0


async def test_a_job_that_does_not_fit_beside_what_the_replica_holds_is_refused_with_the_arithmetic(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.service.engine._lender, "_spare_bytes", lambda: 3 << 20)
    await lend(running, write_loan(running))
    state = await wait_for_end(running)
    assert (state["exitCode"], state["reason"]) == (42, "TrainingDoesNotFit")
    assert state["message"].startswith("The loan needs 1 MiB for its adapter with gradients")
    assert "KV cache and own steps leave" in state["message"]
    assert "Lower processing.maxSeqLen or adaptation.rank" in state["message"]
    assert len(await text(running, max_tokens=2)) > 0


async def test_fewer_samples_run_at_once_where_only_those_fit(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"hyperparameters": {"micro_batch": 4}}
    free, tight = write_loan(running, "free", **wide), write_loan(running, "tight", **wide)
    await lend(running, free)
    assert (await wait_for_end(running))["exitCode"] == 0
    seen = []
    real = loan_memory._step_bytes

    def step_bytes(kept: Any, decoder: Any, lens: list[int]) -> int:
        seen.append(len(lens))
        return real(kept, decoder, lens) if len(lens) == 1 else 1 << 60

    monkeypatch.setattr(loan_memory, "_step_bytes", step_bytes)
    await lend(running, tight)
    assert (await wait_for_end(running))["exitCode"] == 0
    assert seen == [4, 2, 1]
    assert_same_curve(read_curve(tight), read_curve(free))


async def test_the_estimate_of_a_step_is_what_torch_holds_and_a_little_more(
    running: Running,
) -> None:
    config = load_config(write_loan(running).config_path)
    decoder = running.service.engine._ranks.resident()
    resident = Resident(decoder, lambda: None, spare_bytes=lambda: 0, step_tokens=0)
    kept = loan_memory.watch_activations(Sft(), resident, build_lora(decoder, config))
    lora = build_lora(decoder, config)
    sample = Sample(np.arange(400, dtype=np.int32) % 100, np.arange(400) > 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        Sft().loss_sum(decoder, [sample], lora).backward()
    events = profiled.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = max(accumulate(size for _, size in memory))
    assert 0.5 < kept.of([400]) / held < 1.5
    assert held <= loan_memory._step_bytes(kept, decoder, [400])


async def test_a_real_process_refuses_what_its_memory_cannot_hold(tmp_path: Path) -> None:
    """Its cache alone may grow to the size of the machine, though nothing is written to it yet."""
    host_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cache: dict[str, Any] = {"kv_cache_gib": host_gib - 0.5, "block_size": 512}
    async with running_tiny_model(
        tmp_path, adapter_root=[tmp_path], own_process=True, **cache
    ) as server:
        await lend(server, write_loan(server))
        state = await wait_for_end(server)
        assert (state["exitCode"], state["reason"]) == (42, "TrainingDoesNotFit")
        assert "own steps leave 0." in state["message"]
        assert len(await text(server, max_tokens=2)) > 0


async def test_data_that_is_not_there_ends_a_loan_as_it_ends_a_trainer(running: Running) -> None:
    job = write_loan(running)
    (job.root / "data.jsonl").unlink()
    await lend(running, job)
    state = await wait_for_end(running)
    assert (state["exitCode"], state["reason"]) == (42, "DatasetNotFound")
    assert "colours" in state["message"]


async def test_only_the_administrator_lends(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    settings: dict[str, Any] = {"admin_token_file": tmp_path / "token"}
    async with running_tiny_model(tmp_path, **settings) as guarded:
        for method in ("GET", "PUT", "DELETE"):
            assert (await guarded.admin.request(method, "/loan")).status_code == 401
