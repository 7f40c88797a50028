"""Data prepared on Ray: the same as in the trainer, and an end that nobody waits for."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train.config import Processing
from mizzen.runtime.train.errors import DatasetError, PreparationLostError
from mizzen.runtime.train.large.blocks import Block
from mizzen.runtime.train.large.pod_ray import pod_ray
from mizzen.runtime.train.large.prepare import Crew, prepare_large
from mizzen.runtime.train.large.work import BlockReader
from mizzen.runtime.train.preparing import prepare_data
from mizzen.runtime.train.stop import EXIT_YIELDED, StopFlag
from tests.fixtures.prepared_data import SETS, assert_same, write_set
from tests.fixtures.train_runs import run, start, write_job, write_prompts

# Ray starts half a dozen processes.
pytestmark = pytest.mark.timeout(1800)
WAIT_S = 400


@pytest.mark.parametrize("name", ["preferences", "two weighted datasets with copies"])
def test_the_outcome_is_the_small_paths(tmp_path: Path, name: str) -> None:
    assert name in SETS
    in_own_process(outcome_is_the_small_paths, tmp_path, name)


def outcome_is_the_small_paths(crew: Crew, folder: Path, name: str) -> None:
    tokenizer = Tokenizer.load(write_tiny_model(folder / "model"))
    datasets, shape = write_set(folder, name)
    rules = Processing(max_seq_len=96, holdout_ratio=0.2)
    reader = BlockReader(datasets=datasets, rules=rules, shape=shape)
    large = prepare_large(reader, tokenizer, crew, block_bytes=2500)
    assert_same(prepare_data(datasets, tokenizer, rules, shape, pod=None), large)


def test_a_bad_row_is_refused_with_the_same_words(tmp_path: Path) -> None:
    in_own_process(bad_row_is_refused, tmp_path)


def bad_row_is_refused(crew: Crew, folder: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_model(folder / "model"))
    datasets, shape = write_set(folder, "chat")
    path = datasets[0].path
    assert path is not None
    path.write_text(path.read_text() + '\n{"text": 1}\nnot JSON')
    reader = BlockReader(datasets=datasets, rules=Processing(), shape=shape)
    with pytest.raises(DatasetError, match='line 121 has neither "messages"'):
        prepare_large(reader, tokenizer, crew, block_bytes=2500)


def test_a_process_that_dies_is_told_of() -> None:
    in_own_process(death_is_told_of)


def death_is_told_of(crew: Crew) -> None:
    block = Block(dataset=0, path="", start=0, size=0, first_line=1, is_placed=False)

    def die(_: Block) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(PreparationLostError, match="Give the trainer more memory or fewer CPUs"):
        list(crew(die, [block]))


def test_a_job_learns_the_same_by_either_way(tmp_path: Path) -> None:
    jobs = [
        write_job(tmp_path / engine, processing={"engine": engine})
        for engine in ("InProcess", "Ray")
    ]
    # One base: the fingerprint names its path.
    base = json.loads(jobs[0].config_path.read_text())["base_model"]
    for job in jobs:
        document = json.loads(job.config_path.read_text())
        job.config_path.write_text(json.dumps(document | {"base_model": base}))
    assert [run(job) for job in jobs] == [0, 0]
    small, large = jobs
    assert small.curve == large.curve
    assert small.weights_digest == large.weights_digest
    marks = [
        [
            json.loads(path.read_text())["fingerprint"]
            for path in sorted(job.checkpoints.rglob("manifest.json"))
        ]
        for job in jobs
    ]
    assert marks[0] == marks[1] != []


def test_a_job_whose_roles_are_on_ray_prepares_on_the_same(tmp_path: Path) -> None:
    rl = {"rewards": [{"type": "regex", "pattern": "[a-m]"}], "max_new_tokens": 4, "group_size": 2}
    jobs = []
    for engine in ("InProcess", "Ray"):
        root = tmp_path / engine
        root.mkdir()
        prompts = [{"name": "prompts", "path": str(write_prompts(root / "prompts.jsonl"))}]
        jobs.append(
            write_job(
                root,
                method="grpo",
                rl=rl,
                roles="Ray",
                datasets=prompts,
                processing={"engine": engine},
                hyperparameters={"max_steps": 2},
                evaluation={"suites": []},
            )
        )
    assert [run(job) for job in jobs] == [0, 0]
    assert jobs[0].curve == jobs[1].curve


def test_a_yield_while_data_is_prepared_ends_all_of_it_at_once(tmp_path: Path) -> None:
    job = write_job(tmp_path, processing={"engine": "Ray"})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([data.read_text()] * 40_000))  # minutes of work
    process = start(job)
    assert process.pid is not None
    root = psutil.Process(process.pid)
    wait_until(lambda: any("MapWorker" in " ".join(one.cmdline()) for one in below(root)))
    ended = below(root)
    process.terminate()
    process.join(WAIT_S)
    assert process.exitcode == EXIT_YIELDED
    wait_until(lambda: not any(is_alive(one) for one in ended))
    assert not job.checkpoints.exists()


def in_own_process(check: Callable[..., None], *arguments: Path | str) -> None:
    """Check in a process that has not imported Ray: it reads its settings then, and only then."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        process.submit(with_crew, check, *arguments).result()


def with_crew(check: Callable[..., None], *arguments: Path | str) -> None:
    with pod_ray(None, StopFlag()) as place:
        from mizzen.runtime.train.large.on_ray import ray_crew  # noqa: PLC0415 - reads its settings

        check(ray_crew(workers=2, place=place), *arguments)


def below(root: psutil.Process) -> list[psutil.Process]:
    return [one for one in root.children(recursive=True) if is_alive(one)]


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < ends_at
        time.sleep(0.1)
