"""Roles on Ray: the same answers and curve as in one process, and an end that nobody waits for."""

import contextlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import ray
import torch
import urllib3
from ray.exceptions import RayActorError, RayTaskError

from hack.ports import free_port
from mizzen.runtime.errors import RankLostError
from mizzen.runtime.train.config import load_config
from mizzen.runtime.train.curve import read_history
from mizzen.runtime.train.errors import JobConfigError, RoleLostError, TrainerHangsError
from mizzen.runtime.train.roles import node
from mizzen.runtime.train.roles.actors import (
    ReferenceRole,
    RewardRole,
    RolloutRole,
    Seat,
    choose_device_of,
    cut_weights,
    moving_weights,
)
from mizzen.runtime.train.roles.on_ray import RayRoles
from mizzen.runtime.train.samples import Prompt
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from tests.fixtures.train_runs import (
    Job,
    exit_codes,
    run,
    start,
    start_workers,
    write_job,
    write_prompts,
)

# Ray starts half a dozen processes, and each role imports torch.
pytestmark = pytest.mark.timeout(1800)
WAIT_S = 400
LETTERS = [{"type": "regex", "pattern": f"[{span}]"} for span in ("a-m", "n-z", "A-M")]
WORTH = {"suites": [{"name": "worth", "type": "reward", "max_regression_ratio": 10.0}]}
LORA: dict[str, Any] = {}
# One of each of Ray's servers; the others' methods a server does not know.
METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/PushTask",
)
FULL: dict[str, Any] = {"adaptation": {"type": "full"}, "output": {"kind": "model"}}


def rl_job(root: Path, method: str, *, steps: int = 3, **overrides: Any) -> Job:
    root.mkdir(parents=True, exist_ok=True)
    return write_job(
        root,
        method=method,
        rl={"rewards": LETTERS, "max_new_tokens": 8, "group_size": 20, "kl_coef": 0.01},
        datasets=[{"name": "questions", "path": str(write_prompts(root / "q.jsonl"))}],
        hyperparameters={"max_steps": steps, "batch_size": 4, "micro_batch": 40},
        evaluation=WORTH,
        **overrides,
    )


@pytest.fixture
def temporary() -> Iterator[Path]:
    # Ray's sockets lie in there, and a socket's path has room for a hundred letters.
    path = Path(tempfile.mkdtemp(prefix="mz", dir="/tmp"))
    yield path
    # The raylet's agents try for a minute to tell its death to a head that is dead too.
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(path):
                process.kill()
    shutil.rmtree(path, ignore_errors=True)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < ends_at, f"waited in vain for {what}"
        time.sleep(0.02)


def wait_for_step(job: Job, step: int, *pods: BaseProcess) -> None:
    def is_there() -> bool:
        assert [pod.exitcode for pod in pods] == [None] * len(pods), "it ended before"
        return steps_of(job) >= step

    wait_until(is_there, f"step {step}")


def steps_of(job: Job) -> int:
    path = job.checkpoints / "metrics.jsonl"
    return len(read_history(path)) if path.exists() else 0


def command_of(process: psutil.Process) -> str:
    """Return what a process runs; nothing for one that has just ended."""
    with contextlib.suppress(psutil.Error):
        return (process.cmdline() or [""])[0]
    return ""


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process is gone, or waits for nothing but its parent's notice."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def listens(process: psutil.Process) -> list[tuple[str, int]]:
    """Return where a process listens; nowhere when it has just ended."""
    try:
        found = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return []
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


def is_refused(port: int) -> bool:
    """Return whether a port turns away a call of its own kind that bears no token."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        codes = {code_of(channel, method) for method in METHODS}
    if codes == {grpc.StatusCode.UNAVAILABLE}:  # it speaks HTTP
        http = urllib3.PoolManager(retries=False)
        url = f"http://127.0.0.1:{port}/get_or_create_runtime_env"
        return http.request("POST", url, timeout=60).status == 401
    return codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED}


def code_of(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    """Return what came of a call without a token."""
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=60)
    return caught.value.code()


def test_a_rollout_role_draws_what_the_trainer_would_with_its_weights(tmp_path: Path) -> None:
    config = load_config(rl_job(tmp_path, "grpo").config_path)
    seat = Seat(config=config, device="cpu", threads=torch.get_num_threads())
    trainers, role = RolloutRole(seat), RolloutRole(seat)
    with torch.no_grad():
        for parameter in trainers._lora.parameters():
            parameter.normal_(std=0.5)
    prompts = [Prompt(np.arange(5, dtype=np.int32) + seed) for seed in range(6)]
    wanted = trainers.draw(prompts, 7)
    assert role.draw(prompts, 7) != wanted
    buckets = list(cut_weights(moving_weights(trainers._decoder, trainers._lora), 100))
    assert max(sum(len(part.values) for part in bucket) for bucket in buckets) == 100
    for bucket in buckets:
        role.take(bucket)
    assert role.draw(prompts, 7) == wanted


DEVICES = {
    "on a CPU": ("cpu", 0, ["cpu"] * 3),
    "with one GPU": ("cuda", 1, ["cuda:0"] * 3),
    "with two GPUs": ("cuda", 2, ["cuda:1", "cuda:0", "cuda:1"]),
    "with four GPUs": ("cuda", 4, ["cuda:1", "cuda:2", "cuda:3"]),
}


@pytest.mark.parametrize(("trainer", "gpus", "expected"), DEVICES.values(), ids=DEVICES)
def test_roles_take_the_devices_in_turn(trainer: str, gpus: int, expected: list[str]) -> None:
    roles = (RolloutRole, ReferenceRole, RewardRole)
    found = [choose_device_of(role, torch.device(trainer), gpus) for role in roles]
    assert found == expected


def test_roles_on_ray_are_refused_where_nothing_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(JobConfigError, match="roles Ray are for methods grpo and ppo, not sft"):
        load_config(write_job(tmp_path, roles="Ray").config_path)


IMPOSSIBLE = {
    "every weight moves": (FULL, "set adaptation.type to lora or qlora"),
    "roles are on Ray": ({"roles": "Ray"}, "set roles to InProcess"),
}


@pytest.mark.parametrize(("fields", "said"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_replicas_cannot_draw_where(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    rl = {"rewards": LETTERS, "rollout": {"url": "http://chat:8000"}}
    job = write_job(tmp_path, method="grpo", rl=rl, evaluation=WORTH, **fields)
    with pytest.raises(JobConfigError, match=said):
        load_config(job.config_path)


def test_a_yield_in_the_midst_ends_ray_too_and_changes_no_number(
    tmp_path: Path, temporary: Path
) -> None:
    alone = rl_job(tmp_path / "alone", "ppo", steps=20, **FULL)
    assert run(alone) == 0
    job = rl_job(tmp_path / "cast", "ppo", steps=20, roles="Ray", **FULL)
    trainer = start(job, temporary=temporary)
    wait_for_step(job, 1, trainer)
    processes = [
        each
        for each in psutil.Process(trainer.pid).children(recursive=True)
        if not command_of(each).endswith("Agent")
    ]
    assert len(processes) >= 5
    trainer.terminate()
    trainer.join()
    assert trainer.exitcode == 75
    assert 0 < steps_of(job) < 20
    wait_until(lambda: all(map(has_ended, processes)), "the end of Ray")
    assert run(job, temporary=temporary) == 0
    assert job.curve == alone.curve
    assert job.weights_digest == alone.weights_digest
    assert job.last_word["evaluation"] == alone.last_word["evaluation"]


def test_a_role_that_dies_ends_the_generation_and_no_port_is_for_others(
    tmp_path: Path, temporary: Path
) -> None:
    job = rl_job(tmp_path, "grpo", steps=100_000, roles="Auto")  # what a job that says nothing has
    trainer = start(job, temporary=temporary)
    wait_for_step(job, 1, trainer)
    processes = psutil.Process(trainer.pid).children(recursive=True)
    # What the trainer itself has is its progress, for which the pod's probes ask.
    listening = [socket for each in processes for socket in listens(each)]
    assert {address for address, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(listening) >= 5
    assert all(is_refused(port) for _, port in listening)
    (role,) = [each for each in processes if "RolloutRole" in command_of(each)]
    role.kill()
    trainer.join()
    assert trainer.exitcode == 1
    assert job.last_word["reason"] == "RoleLost"
    committed = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(committed.name.removeprefix("step-")) == steps_of(job)


def test_pods_that_play_roles_change_no_number_and_stop_together(
    tmp_path: Path, temporary: Path
) -> None:
    alone = rl_job(tmp_path / "alone", "grpo", steps=20)
    assert run(alone) == 0
    job = rl_job(tmp_path / "cast", "grpo", steps=20, roles="Ray")
    pods = start_workers(job, 3, temporary=temporary)
    wait_for_step(job, 1, *pods)
    pods[1].terminate()
    assert exit_codes(pods) == [75, 75, 75]
    assert 0 < steps_of(job) < 20
    assert exit_codes(start_workers(job, 2, temporary=temporary)) == [0, 0]
    assert job.curve == alone.curve
    assert job.weights_digest == alone.weights_digest


class Answering(RayRoles):
    """Ray's roles without Ray: only what becomes of an answer."""

    def __init__(self, *, timeout_s: float = 60.0, is_alone: bool = True) -> None:
        self._stop, self._timeout_s, self._is_alone = StopFlag(), timeout_s, is_alone


def answering(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def get(asked: list[Any]) -> None:
        raise error

    monkeypatch.setattr(ray, "wait", lambda asked, timeout: (asked, []))
    monkeypatch.setattr(ray, "get", get)


def test_a_mistake_that_a_role_finds_is_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = JobConfigError("It is no reward model.")
    answering(monkeypatch, RayTaskError("of", "traceback", mistake))
    with pytest.raises(JobConfigError, match="no reward model"):
        Answering()._wait(["asked"])


def test_a_bug_in_a_role_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, RayTaskError("of", "traceback", ZeroDivisionError("oh")))
    with pytest.raises(RayTaskError):
        Answering()._wait(["asked"])


@pytest.mark.parametrize(("is_alone", "kind"), [(True, RoleLostError), (False, RankLostError)])
def test_a_lost_role_in_another_pod_may_be_the_pods_end(
    monkeypatch: pytest.MonkeyPatch, is_alone: bool, kind: type[Exception]
) -> None:
    answering(monkeypatch, RayActorError())
    with pytest.raises(kind, match="role on Ray"):
        Answering(is_alone=is_alone)._wait(["asked"])


def test_a_role_that_never_answers_ends_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked))
    with pytest.raises(TrainerHangsError, match="hangTimeoutSeconds"):
        Answering(timeout_s=0.0)._wait(["asked"])


def test_nobody_waits_for_a_role_when_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "wait", lambda asked, timeout: ([], asked))
    roles = Answering()
    roles._stop.ask()
    with pytest.raises(YieldRequested):
        roles._wait(["asked"])


def test_an_agent_s_port_is_one_that_nobody_has_and_the_system_hands_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert node._free_port("127.0.0.1") in range(20_000, 32_000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        monkeypatch.setattr(node, "_PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"No port of {port} to {port} is free at 127.0.0.1"):
            node._free_port("127.0.0.1")
        free = free_port()
        monkeypatch.setattr(node, "_PORTS", [port, free])
        assert node._free_port("127.0.0.1") == free
