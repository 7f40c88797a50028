"""Who plays the roles of a job that leaves it open: processes on Ray where there is room."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.train.config import TrainConfig, load_config
from mizzen.runtime.train.memory import plan_need
from mizzen.runtime.train.roles import choice
from mizzen.runtime.train.roles.choice import settle_roles
from tests.fixtures.train_runs import write_job

CPU = torch.device("cpu")
PLENTY = 1 << 40
RULE = {"rewards": [{"type": "length", "tokens": 4}]}
RL: dict[str, Any] = {"method": "grpo", "rl": RULE, "evaluation": {"suites": []}, "roles": "Auto"}
SERVED = {**RULE, "rollout": {"url": "http://chat:8000"}}


def job_of(folder: Path, **fields: Any) -> TrainConfig:
    return load_config(write_job(folder, **fields).config_path)


CASTS: dict[str, tuple[dict[str, Any], str]] = {
    "on Ray where one worker draws": (RL, "Ray"),
    "on Ray for ppo too": ({**RL, "method": "ppo"}, "Ray"),
    "the trainer's where several workers learn": ({**RL, "workers": 2}, "InProcess"),
    "the trainer's where ranks hold a model together": (
        {**RL, "workers": 2, "parallelism": {"tensor": 2}},
        "InProcess",
    ),
    "the trainer's where replicas draw": ({**RL, "rl": SERVED}, "InProcess"),
    "the trainer's where nothing is drawn": ({"roles": "Auto"}, "InProcess"),
    "the trainer's where the job says so": ({**RL, "roles": "InProcess"}, "InProcess"),
    "on Ray where the job says so": ({**RL, "workers": 2, "roles": "Ray"}, "Ray"),
}


@pytest.mark.parametrize(("fields", "expected"), CASTS.values(), ids=CASTS)
def test_the_roles_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: str
) -> None:
    monkeypatch.setattr(choice, "memory_limit", lambda device: PLENTY)
    config = job_of(tmp_path, **fields)
    assert settle_roles(config, CPU) == config.model_copy(update={"roles": expected})


def test_the_trainer_plays_them_where_processes_would_leave_less_than_half_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = job_of(tmp_path, **RL)
    on_ray = config.model_copy(update={"roles": "Ray"})
    held = plan_need(on_ray, ArchSpec.from_dir(config.base_model), CPU).total + (2 << 30)

    def given(room: int) -> str:
        monkeypatch.setattr(choice, "memory_limit", lambda device: room)
        return settle_roles(config, CPU).roles

    assert given(2 * held) == "Ray"
    assert not caplog.records
    assert given(2 * held - 1) == "InProcess"
    assert f"hold {held >> 20} MiB, more than half of the" in caplog.text


def test_on_a_gpu_the_hosts_memory_counts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    host = {"cpu": 4 << 30, "cuda": PLENTY}
    monkeypatch.setattr(choice, "memory_limit", lambda device: host[device.type])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = job_of(tmp_path, **RL)
    assert settle_roles(config, torch.device("cuda")).roles == "Ray"
    host["cpu"] -= 1
    assert settle_roles(config, torch.device("cuda")).roles == "InProcess"
    assert "hold 2048 MiB, more than half of the 4095 MiB" in caplog.text
