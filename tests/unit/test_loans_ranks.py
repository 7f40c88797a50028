"""A loan beside a model that several ranks hold: all of them train, and end together."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mizzen.runtime.engine import lending_rank, ranks
from mizzen.runtime.engine.config import EngineConfig
from mizzen.runtime.engine.lending_rank import LendingRank, RecentSteps
from mizzen.runtime.engine.wire import Lend
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.twin import twin_of
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.fewer import FewerStore, Limits
from mizzen.runtime.train.halving import FewerAtOnce
from mizzen.runtime.train.loop import Loop
from tests.fixtures import train_runs
from tests.fixtures.runtime_server import Running, begin_answer, eventually, running_tiny_model
from tests.fixtures.train_runs import assert_same_curve, read_curve
from tests.unit.test_loans import (
    BODY,
    LONG,
    begin,
    lend,
    text,
    until_step,
    wait_for_end,
    write_loan,
)

SPREAD: dict[str, Any] = {"tensor_parallel_size": 2}


@pytest.fixture
async def spread(tmp_path: Path) -> AsyncIterator[Running]:
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path], **SPREAD) as running:
        yield running


def other_rank(running: Running) -> psutil.Process:
    (pid,) = running.service.engine._ranks._ranks.pids
    return psutil.Process(pid)


async def test_ranks_learn_what_a_trainer_with_the_whole_base_learns(
    spread: Running, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"adaptation": {"dropout": 0.1}}
    lent, own = write_loan(spread, **settings), train_runs.write_job(tmp_path / "own", **settings)
    await lend(spread, lent)
    state = await wait_for_end(spread)
    assert (state["exitCode"], state["message"]) == (0, "")
    assert await asyncio.to_thread(train_runs.run, own) == 0
    assert_same_curve(read_curve(lent), read_curve(own))
    assert state["progress"]["evaluation"][0]["candidate"] == pytest.approx(
        own.last_word["evaluation"][0]["candidate"], rel=1e-3
    )
    (artifact,) = lent.artifacts
    loaded = await spread.http.post(
        "/v2/repository/models/new/load", json={"parameters": {"path": str(artifact)}}
    )
    assert loaded.status_code == 200, loaded.text
    assert await text(spread, model="new") != await text(spread)


async def test_ranks_stand_still_while_a_request_runs_and_go_on_after_it(spread: Running) -> None:
    alone = await text(spread)
    job = write_loan(spread, hyperparameters=LONG)
    await begin(spread, job)
    stream = await begin_answer(spread, BODY)
    before = len(read_curve(job))
    assert await stream == alone, "the weights and the sums are as they were"
    # One step may be beyond its last look up.
    assert len(read_curve(job)) <= before + 1
    assert await text(spread) == alone
    await until_step(spread, job, before + 4)


async def test_what_ranks_have_committed_one_goes_on_with(tmp_path: Path) -> None:
    settings = {"hyperparameters": {"max_steps": 60}, "checkpoint": {"every_steps": 1000}}
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path], **SPREAD) as first:
        job = write_loan(first, **settings)
        await begin(first, job)
        assert (await first.admin.delete("/loan")).status_code == 202
        state = await wait_for_end(first)
        assert state["exitCode"] == 75
        assert state["progress"]["checkpoint"]["step"] == state["progress"]["step"]
        # A second loan begins though the other rank may still be at the first one's end.
        whole = write_loan(first, "whole", **settings)
        await lend(first, whole)
        assert (await wait_for_end(first))["exitCode"] == 0
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path]) as second:
        await lend(second, job, generation=2)
        assert (await wait_for_end(second))["exitCode"] == 0
    assert 2 <= state["progress"]["step"] < 60
    assert_same_curve(read_curve(job), read_curve(whole))


@pytest.mark.parametrize("how", ["/sleep", "/weights", "/drain"])
async def test_whoever_takes_the_weights_away_ends_the_loan_on_all_ranks(
    spread: Running, how: str
) -> None:
    alone = await text(spread)
    job = write_loan(spread, hyperparameters=LONG)
    await begin(spread, job)
    model = str(spread.service.config.model_path)
    body = {"path": model} if how == "/weights" else {"timeoutSeconds": 100}
    assert (await spread.admin.post(how, json=body)).status_code < 300
    state = await wait_for_end(spread)
    assert state["exitCode"] == 75
    assert state["progress"]["checkpoint"]["step"] == state["progress"]["step"]
    if how == "/sleep":
        assert (await spread.admin.post("/wake")).status_code < 300
    if how != "/drain":
        assert await text(spread) == alone
        await begin(spread, write_loan(spread, "next"), step=1)


async def test_what_one_rank_alone_finds_wrong_ends_the_loan_and_no_request(
    spread: Running,
) -> None:
    alone = await text(spread)
    job = write_loan(spread, hyperparameters=LONG)
    await begin(spread, job)
    # As on a full volume, for the other rank's part of a commit alone.
    other = other_rank(spread)
    other.rlimit(psutil.RLIMIT_FSIZE, (0, 0))
    state = await wait_for_end(spread)
    assert state["exitCode"] not in (None, 0)
    assert await text(spread) == alone
    assert (await spread.admin.get("/readyz")).status_code == 200


async def test_a_rank_that_dies_ends_the_replica_as_it_does_without_a_loan(
    tmp_path: Path,
) -> None:
    with suppress(RankLostError):  # the server's last words, if it was asked to stop after that
        async with running_tiny_model(tmp_path, adapter_root=[tmp_path], **SPREAD) as spread:
            await begin(spread, write_loan(spread, hyperparameters=LONG))
            other_rank(spread).send_signal(signal.SIGKILL)
            engine = spread.service.engine
            await eventually(lambda: engine.death() is not None)
    assert isinstance(engine.death(), RankLostError)


async def test_the_rank_with_the_least_memory_counts(
    spread: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread.service.engine._lender, "_spare_bytes", lambda: 3 << 20)
    await lend(spread, write_loan(spread))
    state = await wait_for_end(spread)
    assert (state["exitCode"], state["reason"]) == (42, "TrainingDoesNotFit")
    monkeypatch.undo()
    await begin(spread, write_loan(spread, "next"), step=1)


async def test_ranks_of_which_one_runs_out_of_memory_go_on_with_half_as_many_samples(
    spread: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loop._accumulate

    def accumulate(self: Loop, *args: Any, **options: Any) -> float:
        if self._at_once.samples > 1:
            raise torch.OutOfMemoryError
        return real(self, *args, **options)

    monkeypatch.setattr(Loop, "_accumulate", accumulate)
    job = write_loan(spread, hyperparameters={"micro_batch": 4, "max_steps": 4})
    for generation, (code, left) in enumerate([(75, 2), (75, 1), (0, 1)], start=1):
        await lend(spread, job, generation=generation)
        assert (await wait_for_end(spread))["exitCode"] == code
        note = json.loads((job.checkpoints / "at-once-0.json").read_text())
        assert (note["ranks"], note["micro_batch"]) == (2, left)
    assert len(read_curve(job)) == 4


async def test_another_rank_that_ran_out_of_memory_is_no_crash(
    spread: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the note is made up: what a rank does that runs out is seen on the first one above."""
    job = write_loan(spread, hyperparameters={"micro_batch": 4, "max_steps": 4})

    def accumulate(self: Loop, *args: Any, **options: Any) -> float:
        raise RankLostError("Rank 0 lost another rank in a collective.")

    monkeypatch.setattr(Loop, "_accumulate", accumulate)
    await lend(spread, job)
    assert (await wait_for_end(spread))["reason"] == "RankLost"
    fewer = FewerAtOnce("micro_batch", 2)
    FewerStore(job.checkpoints, ranks=2).note(1, Limits(micro_batch=4), fewer)

    def later(self: Loop, *args: Any, **options: Any) -> float:
        FewerStore(job.checkpoints, ranks=2).note(1, Limits(micro_batch=2), fewer_yet)
        raise RankLostError("Rank 0 lost another rank in a collective.")

    fewer_yet = FewerAtOnce("micro_batch", 1)
    monkeypatch.setattr(Loop, "_accumulate", later)
    await lend(spread, job, generation=2)
    assert (await wait_for_end(spread))["exitCode"] == 75


def test_a_rank_that_is_only_told_of_steps_takes_requests_for_there_a_moment_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(lending_rank.time, "monotonic", lambda: now)
    steps = RecentSteps()
    assert not steps.are_recent()
    with steps.one():
        now += 60
        assert steps.are_recent()
    assert steps.are_recent()
    now += 0.09
    assert steps.are_recent()
    now += 0.02
    assert not steps.are_recent()


def test_a_part_that_could_not_begin_is_told_of_and_holds_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from hack.tiny_model import write_tiny_model  # noqa: PLC0415

    decoder = load_decoder(write_tiny_model(tmp_path / "tiny"), dtype=torch.float32)
    rank = LendingRank(1, 2)
    message = Lend("no job", tmp_path / "store", 8)
    rank.begin(message, decoder, lambda: False, spare_bytes=lambda: 0)
    rank.take_back()
    assert "part of a loan has not begun" in caplog.text
    assert "The loan is not a valid job" in caplog.text


def test_ranks_share_what_is_free_of_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cached:
        def unfilled_bytes(self) -> int:
            return 100

    monkeypatch.setattr(ranks, "free_bytes", lambda device: 3000)
    config = EngineConfig(model=Path("tiny"), tensor_parallel_size=3)
    runner: Any = Cached()
    assert ranks.spare_bytes(config, runner, torch.device("cpu")) == 900
    assert ranks.spare_bytes(config, runner, torch.device("cuda")) == 2900
    assert ranks.spare_bytes(config, runner, torch.device("cpu"), unfilled_bytes=950) == 0


STAGES = {"pipeline_parallel_size": 2}


async def test_a_model_cut_into_stages_lends_nothing(tmp_path: Path) -> None:
    async with running_tiny_model(tmp_path, adapter_root=[tmp_path], **STAGES) as cut:
        answer = await lend(cut, write_loan(cut))
    assert answer.status_code == 400
    assert "spec.parallelism.pipeline and nodes 1" in answer.json()["error"]


def test_a_twin_has_the_same_weights_and_other_lines(tmp_path: Path) -> None:
    from hack.tiny_model import write_tiny_model  # noqa: PLC0415

    decoder = load_decoder(write_tiny_model(tmp_path / "tiny"), dtype=torch.float32)
    group = RankGroup()
    twin = twin_of(decoder, group)
    assert twin.group is group is twin.place.group
    held = {id(weight) for weight in decoder.parameters()}
    assert {id(weight) for weight in twin.parameters()} == held
    mine, old = [
        {value for part in model.modules() for value in vars(part).values()
         if isinstance(value, RankGroup)}
        for model in (twin, decoder)
    ]  # fmt: skip
    assert group in mine
    assert decoder.group not in mine
    assert group not in old
    names = [shard.name for shard in twin.shards()]
    assert names == [shard.name for shard in decoder.shards()]
    assert len(names) == len(set(names))
