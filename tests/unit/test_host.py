"""Messages between ranks, and what the host grants."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mizzen.runtime.engine.batch import StepInput, dummy_step
from mizzen.runtime.engine.heap import Rest, give_back_freed
from mizzen.runtime.engine.memory import untouched_bytes, zeros_when_touched
from mizzen.runtime.engine.wire import Allocate, Clear, Lend, Load, decode, encode
from mizzen.runtime.host import cpu_count, memory_available_bytes


def test_messages_arrive_as_they_were_sent() -> None:
    step = StepInput(
        token_ids_T=np.array([5, 6, 7, 8]),
        positions_T=np.array([9, 0, 1, 2]),
        slots_T=np.array([25, 32, 33, 34]),
        query_lens=[1, 3],
        context_lens=[10, 3],
        block_tables_SB=np.array([[1, 0], [2, 3]]),
        sample_at_N=np.array([0]),
        lora_slots_S=[0, 2],
    )
    for message in (step, dummy_step([1, 1], block_size=4)):
        got = decode(encode(message))
        assert isinstance(got, StepInput)
        for name in StepInput.__dataclass_fields__:
            assert np.array_equal(getattr(got, name), getattr(message, name)), name
    lend = Lend('{"job": "Müller"}', Path("/tmp/ä/store"), 512)
    for other in (Allocate(77), Load(3, Path("/mnt/pvc/ä/b")), Clear(3), lend):
        assert decode(encode(other)) == other


QUOTAS = {
    "a quota of two and a half CPUs": ({"cpu.max": "250000 100000"}, 2),
    "less than one CPU": ({"cpu.max": "50000 100000"}, 1),
    "an older kernel's quota": ({"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, 1),
}


@pytest.mark.parametrize(("files", "expected"), QUOTAS.values(), ids=QUOTAS)
def test_threads_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_count(tmp_path) == expected


def test_without_a_quota_every_allowed_cpu_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(5)))
    assert cpu_count(tmp_path) == 5
    (tmp_path / "cpu.max").write_text("max 100000")
    assert cpu_count(tmp_path) == 5


def test_memory_is_what_the_cgroup_still_allows(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert memory_available_bytes(tmp_path, meminfo) == 8000 * 1024
    (tmp_path / "memory.max").write_text("4096000")
    (tmp_path / "memory.current").write_text("1096000")
    assert memory_available_bytes(tmp_path, meminfo) == 3_000_000
    stat = "anon 500000\nactive_file 200000\ninactive_file 300000\nfile_mapped 100000\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert memory_available_bytes(tmp_path, meminfo) == 3_400_000, "files that were read may go"
    (tmp_path / "memory.max").write_text("max")
    assert memory_available_bytes(tmp_path, meminfo) == 8000 * 1024


def test_only_what_was_written_of_a_cache_is_held() -> None:
    cache = zeros_when_touched((64, 1 << 20), torch.uint8)
    assert untouched_bytes(cache) == pytest.approx(64 << 20, abs=4 << 20)
    cache[:32] = 1
    assert untouched_bytes(cache) == pytest.approx(32 << 20, abs=4 << 20)


def anonymous_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(rollup.split("Anonymous:")[1].split()[0])


def test_freed_memory_between_blocks_in_use_is_given_back() -> None:
    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 MB
    kept = blocks[::2]
    del blocks
    before = anonymous_bytes()
    give_back_freed()
    assert before - anonymous_bytes() > 30_000_000
    assert all(block[0] == 1 for block in kept)


RESTS = {
    "rests once, however long": ([(5, False)] * 6, [3]),
    "does not rest while requests run between steps": ([(5, True)] * 6, []),
    "does not rest while each look finds new steps": ([(at, False) for at in range(1, 7)], []),
    "rests again after it has worked": ([(5, False)] * 4 + [(6, True)] + [(6, False)] * 3, [3, 7]),
}


@pytest.mark.parametrize(("looks", "begins_at"), RESTS.values(), ids=RESTS)
def test_an_engine(looks: list[tuple[int, bool]], begins_at: list[int]) -> None:
    rest = Rest(beats=3)
    begins = [rest.begins(steps, is_busy=is_busy) for steps, is_busy in looks]
    assert [at for at, begun in enumerate(begins) if begun] == begins_at
