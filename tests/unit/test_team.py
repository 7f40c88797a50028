"""The threads that OpenMP keeps for whoever computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mizzen.runtime.engine.engine import Engine
from mizzen.runtime.kernels.team import dismiss_team, openmp
from tests.fixtures.engine_models import save_served_llama, tiny_config

pytestmark = pytest.mark.skipif(openmp() is None, reason="torch's OpenMP here is not GNU's")


def threads() -> set[str]:
    return {task.name for task in Path("/proc/self/task").iterdir()}


def compute() -> None:
    numbers = torch.ones(1 << 20)
    assert (numbers + numbers).sum() == 2 << 20


@pytest.fixture
def worker() -> Iterator[ThreadPoolExecutor]:
    """One thread, and two with what OpenMP keeps for it: it is torch that keeps count."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as worker:
        worker.submit(torch.set_num_threads, 2).result()
        yield worker
    torch.set_num_threads(threads)


def test_a_dismissed_team_is_gone_and_comes_again(worker: ThreadPoolExecutor) -> None:
    before = threads()
    for _ in range(2):
        worker.submit(compute).result()
        assert len(threads() - before) == 1
        worker.submit(dismiss_team).result()
        assert threads() <= before


async def test_whoever_starts_an_engine_keeps_no_team(
    worker: ThreadPoolExecutor, tmp_path: Path
) -> None:
    # So wide that torch and our kernels share the work out.
    save_served_llama(tmp_path, hidden_size=512, intermediate_size=2048)
    config = tiny_config(tmp_path, dtype="bfloat16", cpu_threads=2)
    before = threads()
    engine = worker.submit(Engine.start, config).result()
    assert len(threads() - before) == 1  # the loop's
    await engine.stop()
