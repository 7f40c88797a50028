"""What may go wrong within a step: gradients that are no numbers, memory, and standing still."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hack.tiny_model import write_tiny_model
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train import loop as loop_module
from mizzen.runtime.train.batches import SampleOrder
from mizzen.runtime.train.checkpoint import CheckpointStore, Counters
from mizzen.runtime.train.config import Budget, Checkpointing, Hyperparameters
from mizzen.runtime.train.curve import read_history
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.errors import (
    LossNotFiniteError,
    MemoryTooSmallError,
)
from mizzen.runtime.train.halving import FewerAtOnce
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.ledger import DiskLedger
from mizzen.runtime.train.loop import Loop, LoopParts
from mizzen.runtime.train.methods.method import StepNotFiniteError
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.progress import ProgressBoard
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.trainable import Trainable, full_views
from mizzen.runtime.train.workers import Workers
from tests.fixtures.train_runs import run, write_job

BAD = 200  # a token that makes the loss of its sample no number


class Fragile(Sft):
    """Cross entropy, with faults on demand."""

    def __init__(self, *, room: int = 100, error: type[RuntimeError] = RuntimeError) -> None:
        self.room = room
        self.error = error
        self.sizes: list[int] = []
        self.is_astray = False

    def loss_sum(self, decoder: Decoder, items: Sequence[Sample], lora: LoraDelta | None) -> Tensor:
        self.sizes.append(len(items))
        if len(items) > self.room:
            raise self.error("DefaultCPUAllocator: not enough memory: you tried to allocate 1 GB")
        loss = super().loss_sum(decoder, items, lora)
        is_bad = self.is_astray or any(BAD in item.token_ids_T for item in items)
        return loss * float("nan") if is_bad else loss


def samples(count: int, *, bad: Sequence[int] = ()) -> tuple[Sample, ...]:
    random = np.random.RandomState(0)
    made = []
    for index in range(count):
        token_ids_T = random.randint(0, 100, 8).astype(np.int32)
        if index in bad:
            token_ids_T[3] = BAD
        made.append(Sample(token_ids_T, np.arange(8) > 3))
    return tuple(made)


def loop_of(
    root: Path, data: Sequence[Sample], method: Sft, *, workers: Workers | None = None, **hyper: Any
) -> Loop:
    decoder = load_decoder(write_tiny_model(root / "model"), dtype=torch.float32)
    prepared = Prepared(
        train=(tuple(data),), weights=(1.0,), holdout=(), truncated=0, dropped=0, digest="d"
    )
    board = ProgressBoard(generation=1)
    parts = LoopParts(
        decoder=decoder,
        trainable=Trainable(full_views(decoder), lora=None, weight_decay=0.0),
        lora=None,
        method=method,
        order=SampleOrder(prepared, seed=0),
        ledger=DiskLedger(
            CheckpointStore(root / "c", fingerprint="f", base="b", generation=1, keep=2),
            LossHistory(root / "c", resumed_step=0),
            board,
        ),
        board=board,
        stop=StopFlag(),
        workers=workers or Workers(),
    )
    rules = {"max_steps": 6, "batch_size": 2, "micro_batch": 2, "learning_rate": 1e-3, **hyper}
    return Loop(
        parts,
        hyper=Hyperparameters(**rules),
        checkpointing=Checkpointing(directory=root / "c", every_steps=1),
        budget=Budget(),
        counters=Counters(),
    )


def test_samples_without_a_finite_gradient_are_skipped_and_counted(tmp_path: Path) -> None:
    # Fourteen of fifteen samples are seen, so the bad one is, unless it comes last.
    loop = loop_of(tmp_path, samples(15, bad=[4]), Fragile())
    loop.run()
    assert (loop.counters.step, loop.counters.skipped) == (6, 2)
    assert loop.counters.samples == 6 * 2 + 2
    records = read_history(tmp_path / "c" / "metrics.jsonl")
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(record.loss) for record in records)


def test_the_time_of_a_commit_is_not_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, now_s = loop_of(tmp_path, samples(15), Fragile()), [0.0]
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    ledger, count = loop._parts.ledger, Fragile.loss_sum

    def commit(*_: Any, can_wait: bool = False) -> None:
        now_s[0] += 3600

    def loss_sum(*args: Any) -> Tensor:
        now_s[0] += 2
        return count(*args)

    monkeypatch.setattr(ledger, "commit", commit)
    monkeypatch.setattr(Fragile, "loss_sum", loss_sum)
    loop.run()
    assert (loop.counters.step, loop.counters.trained_ms) == (6, 6 * 2000)


def test_weights_that_went_astray_are_taken_back_to_the_last_committed_ones(
    tmp_path: Path,
) -> None:
    method = Fragile()
    loop = loop_of(tmp_path, samples(40), method, max_steps=4)
    parts = loop._parts
    true_step, calls = parts.trainable.step, [0]

    def step(*, learning_rate: float) -> None:
        true_step(learning_rate=learning_rate)
        calls[0] += 1
        if calls[0] == 2:  # the second step ruins the weights before they are committed
            loop._checkpointing = loop._checkpointing.model_copy(update={"every_steps": 100})
            with torch.no_grad():
                next(parts.trainable.weights())[1].fill_(float("nan"))

    parts.trainable.step = step  # type: ignore[method-assign]
    loop.run()
    assert loop.counters.step == 4
    assert loop.counters.skipped == 3 * 2
    assert [record.step for record in read_history(tmp_path / "c" / "metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]
    assert all(bool(p.isfinite().all()) for p in parts.trainable.parameters)


def test_a_job_that_goes_astray_again_ends(tmp_path: Path) -> None:
    method = Fragile()
    loop = loop_of(tmp_path, samples(40), method)
    loop.commit()
    method.is_astray = True
    with pytest.raises(LossNotFiniteError, match=r"Lower hyperparameters.learningRate"):
        loop.run()
    assert loop.counters.skipped == 6 * 2


def test_a_step_that_cannot_even_be_begun_with_the_weights_is_taken_back_too(
    tmp_path: Path,
) -> None:
    class Mute(Sft):
        refused = 0

        def updates(self, *args: Any, seed: int) -> Any:
            if loop.counters.step == 2 and self.refused < 3:
                self.refused += 1
                raise StepNotFiniteError("nobody can answer with this policy")
            return super().updates(*args, seed=seed)

    method = Mute()
    loop = loop_of(tmp_path, samples(40), method, max_steps=4)
    loop.run()
    assert (loop.counters.step, loop.counters.skipped) == (4, 3 * 2)
    assert method.refused == 3


def test_a_policy_that_never_answers_ends_the_job_and_is_told_why(tmp_path: Path) -> None:
    class Mute(Sft):
        def updates(self, *args: Any, seed: int) -> Any:
            raise StepNotFiniteError("nobody can answer with this policy")

    with pytest.raises(LossNotFiniteError, match=r"step 1: nobody can answer with this policy\. L"):
        loop_of(tmp_path, samples(40), Mute()).run()


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_memory_that_runs_out_halves_what_runs_at_once(
    tmp_path: Path, error: type[RuntimeError]
) -> None:
    method = Fragile(room=2, error=error)
    loop = loop_of(tmp_path, samples(16), method, batch_size=8, micro_batch=8, max_steps=2)
    loop.run()
    assert method.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    roomy = loop_of(
        tmp_path / "roomy", samples(16), Sft(), batch_size=8, micro_batch=2, max_steps=2
    )
    roomy.run()
    assert (tmp_path / "c" / "metrics.jsonl").read_text() == (
        tmp_path / "roomy" / "c" / "metrics.jsonl"
    ).read_text()


def test_memory_that_not_even_one_sample_fits_into_ends_the_job(tmp_path: Path) -> None:
    with pytest.raises(MemoryTooSmallError, match=r"Lower processing.maxSeqLen"):
        loop_of(tmp_path, samples(4), Fragile(room=0)).run()


def test_ranks_that_share_a_model_cannot_each_try_with_fewer_samples(tmp_path: Path) -> None:
    pair = Workers(tensor=RankGroup(0, 2))
    with pytest.raises(FewerAtOnce, match="no more than 1 at once"):
        loop_of(tmp_path, samples(4), Fragile(room=1), workers=pair).run()


class Twice(Sft):
    """Makes two updates in each step."""

    def updates(self, decoder: Decoder, items: Sequence[Any], lora: Any, *, seed: int) -> Any:
        return [items, items]


class Forsaken(Workers):
    """Workers of which one is lost when gradients are summed for the n-th time."""

    def __init__(self, *, at: int) -> None:
        super().__init__()
        self.left = at

    def sum_with_gradients(self, parameters: Any, values: Sequence[float]) -> list[float]:
        self.left -= 1
        if self.left == 0:
            raise RankLostError("Rank 0 lost another rank in a collective.")
        return super().sum_with_gradients(parameters, values)


LOSSES = {"before its first update": (3, True), "before its second update": (4, False)}


@pytest.mark.parametrize(("at", "is_whole"), LOSSES.values(), ids=LOSSES)
def test_a_step_that_was_broken_off_is_a_state_to_commit_only(
    tmp_path: Path, at: int, is_whole: bool
) -> None:
    loop = loop_of(tmp_path, samples(8), Twice(), workers=Forsaken(at=at))
    with pytest.raises(RankLostError):
        loop.run()
    assert (loop.counters.step, loop.is_whole) == (1, is_whole)


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    class Broken(Sft):
        def loss_sum(self, *_: object) -> Tensor:  # type: ignore[override]
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        loop_of(tmp_path, samples(4), Broken()).run()


def test_a_trainer_that_stands_still_is_ended_and_says_so(tmp_path: Path) -> None:
    # No micro-batch can be so short that the watchdog would not see it as standing still.
    job = write_job(
        tmp_path, failure={"hang_timeout_s": 1e-9}, hyperparameters={"max_steps": 10**6}
    )
    assert run(job) == 1
    assert job.last_word["reason"] == "TrainerHangs"
    assert "Raise failure.hangTimeoutSeconds" in job.last_word["message"]
    assert json.loads(job.config_path.read_text())["failure"] == {"hang_timeout_s": 1e-9}
