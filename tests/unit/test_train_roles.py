"""Roles on Ray: the same answers and curve as in one process, and an end that nobody waits for."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
import urllib3

from mizzen.runtime.train.config import load_config
from mizzen.runtime.train.history import read_history
from mizzen.runtime.train.roles.actors import RolloutRole, Seat, cut_weights, moving_weights
from mizzen.runtime.train.samples import Prompt
from tests.fixtures.train_runs import Job, run, start, write_job, write_prompts

# Ray starts half a dozen processes, and each role imports torch.
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
    shutil.rmtree(path, ignore_errors=True)


def wait_until(is_so: Callable[[], Any], what: str) -> Any:
    ends_at = time.monotonic() + WAIT_S
    while not (found := is_so()):
        assert time.monotonic() < ends_at, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def steps_of(job: Job) -> int:
    path = job.checkpoints / "metrics.jsonl"
    return len(read_history(path)) if path.exists() else 0


def listens(process: psutil.Process) -> list[tuple[str, int]]:
    """Return where a process listens."""
    found = process.net_connections(kind="tcp")
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


def test_a_yield_in_the_midst_ends_ray_too_and_changes_no_number(
    tmp_path: Path, temporary: Path
) -> None:
    alone = rl_job(tmp_path / "alone", "ppo", steps=6, **FULL)
    assert run(alone) == 0
    job = rl_job(tmp_path / "cast", "ppo", steps=6, roles="Ray", **FULL)
    trainer = start(job, temporary=temporary)
    wait_until(lambda: steps_of(job), "the first step")
    processes = psutil.Process(trainer.pid).children(recursive=True)
    trainer.terminate()
    trainer.join()
    assert trainer.exitcode == 75
    assert 0 < steps_of(job) < 6
    wait_until(lambda: not any(map(psutil.Process.is_running, processes)), "the end of Ray")
    assert run(job, temporary=temporary) == 0
    assert job.curve == alone.curve
    assert job.weights_digest == alone.weights_digest
    assert job.last_word["evaluation"] == alone.last_word["evaluation"]


def test_a_role_that_dies_ends_the_generation_and_no_port_is_for_others(
    tmp_path: Path, temporary: Path
) -> None:
    job = rl_job(tmp_path, "grpo", steps=100_000, roles="Ray")
    trainer = start(job, temporary=temporary)
    wait_until(lambda: steps_of(job), "the first step")
    processes = psutil.Process(trainer.pid).children(recursive=True)
    listening = [socket for each in processes for socket in listens(each)]
    assert {address for address, _ in listening} <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert len(listening) >= 5
    assert all(is_refused(port) for _, port in listening)
    (role,) = [each for each in processes if "RolloutRole" in "".join(each.cmdline())]
    role.kill()
    trainer.join()
    assert trainer.exitcode == 1
    assert job.last_word["reason"] == "RoleLost"
    committed = sorted(job.checkpoints.glob("step-*"))[-1]
    assert int(committed.name.removeprefix("step-")) == steps_of(job)
