"""A state that can wait is written while further steps run, as it was and before the next one."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mizzen.runtime.train import ledger as ledger_module
from mizzen.runtime.train.checkpoint import CheckpointStore, Committed, Counters, TrainState
from mizzen.runtime.train.curve import StepRecord
from mizzen.runtime.train.errors import StorageFullError
from mizzen.runtime.train.history import LossHistory
from mizzen.runtime.train.ledger import DiskLedger
from mizzen.runtime.train.progress import ProgressBoard

WAIT_S = 60


class Weights:
    """What moves: one tensor, of which the checkpoint sees a part."""

    def __init__(self) -> None:
        self.whole = torch.zeros(4, 6)
        self.steps = 0

    def state_tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"weights": {"w": self.whole[:, :3]}}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], *, steps: int) -> None:
        self.steps = steps
        self.whole[:, :3] = tensors["weights"]["w"]


class SlowStore(CheckpointStore):
    """Writes when it is told to, or fails."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, fingerprint="f", base="b", generation=1, keep=9)
        self.may_write = threading.Event()
        self.is_full = False
        self.threads: list[str] = []

    def commit(self, state: TrainState) -> Committed:
        self.threads.append(threading.current_thread().name)
        assert self.may_write.wait(WAIT_S)
        if self.is_full:
            raise StorageFullError("A checkpoint", directory=self.directory)
        return super().commit(state)


@pytest.fixture
def store(tmp_path: Path) -> SlowStore:
    return SlowStore(tmp_path)


def ledger_of(store: SlowStore) -> Any:
    history = LossHistory(store.directory, resumed_step=0)
    return DiskLedger(store, history, ProgressBoard(generation=1), writes_beside=True)


def record(step: int) -> StepRecord:
    return StepRecord(step=step, loss=1.0, lr=0.1, grad_norm=1.0, tokens=step)


def is_beside(store: SlowStore) -> list[bool]:
    return [name != threading.main_thread().name for name in store.threads]


def test_steps_go_on_while_a_state_is_written_as_it_was(store: SlowStore) -> None:
    ledger, weights = ledger_of(store), Weights()
    ledger.commit(Counters(step=1), weights, can_wait=True)
    weights.whole.fill_(7.0)
    ledger.append(record(2))
    assert store.steps() == []
    store.may_write.set()
    ledger.commit(Counters(step=2), weights)
    assert store.steps() == [1, 2]
    assert is_beside(store) == [True, False]
    for step, value in ((1, 0.0), (2, 7.0)):
        assert bool((store.read(step).tensors["weights"]["w"] == value).all())


def test_one_state_is_written_at_a_time(store: SlowStore) -> None:
    ledger, weights = ledger_of(store), Weights()
    ledger.commit(Counters(step=1), weights, can_wait=True)
    timer = threading.Timer(0.2, store.may_write.set)
    timer.start()
    ledger.commit(Counters(step=2), weights, can_wait=True)
    assert store.steps()[0] == 1
    assert ledger.roll_back(weights) == Counters(step=2)
    assert weights.steps == 2


@pytest.mark.parametrize("what", ["the next step", "the next commit"])
def test_what_goes_wrong_beside_is_raised_by(store: SlowStore, what: str) -> None:
    ledger, weights = ledger_of(store), Weights()
    store.is_full = True
    store.may_write.set()
    ledger.commit(Counters(step=1), weights, can_wait=True)
    with pytest.raises(StorageFullError, match="the volume is full"):
        if what == "the next commit":
            ledger.commit(Counters(step=2), weights)
        else:
            for step in range(2, 10**6):
                ledger.append(record(step))


def test_where_memory_holds_no_copy_the_steps_wait(
    store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, weights = ledger_of(store), Weights()
    store.may_write.set()
    state_bytes = 4 * 3 * 4
    monkeypatch.setattr(ledger_module, "memory_available_bytes", lambda: state_bytes * 4 - 1)
    ledger.commit(Counters(step=1), weights, can_wait=True)
    monkeypatch.setattr(ledger_module, "memory_available_bytes", lambda: state_bytes * 4)
    ledger.commit(Counters(step=2), weights, can_wait=True)
    ledger.commit(Counters(step=3), weights)
    assert is_beside(store) == [False, True, False]
