"""The dense window against paged attention, and the small parts around the runner."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.runtime.attention.base import KvShape, PagedBatch
from mizzen.runtime.attention.sdpa import PagedSdpa
from mizzen.runtime.engine.batch import StepInput, dummy_step
from mizzen.runtime.engine.decode_window import DecodeWindow, WindowAttend
from mizzen.runtime.engine.host import cpu_count, memory_available_bytes
from mizzen.runtime.engine.wire import Allocate, Clear, Load, decode, encode

LAYERS, HEADS, KV_HEADS, DIM, SIZE = 2, 4, 2, 8, 4
BLOCKS_EACH = 60


class Model:
    """Random queries, keys and values; two caches, of which one has a window beside it."""

    def __init__(self, *, max_rows: int = 4, max_bytes: int = 1 << 30) -> None:
        shape = KvShape(LAYERS, 8 * BLOCKS_EACH + 1, KV_HEADS, DIM, SIZE)
        self.plain, self.windowed = (shape.allocate(dtype=torch.float32) for _ in range(2))
        self.window = DecodeWindow(self.windowed, max_rows=max_rows, max_bytes=max_bytes)
        self.random = torch.Generator().manual_seed(0)

    def step(self, lengths: dict[int, tuple[int, int]]) -> object:
        """Compute (done, new) tokens of each sequence both ways and compare."""
        items = sorted(lengths.items(), key=lambda item: item[1][1] > 1)
        batch = PagedBatch.build(
            query_lens=[new for _, (_, new) in items],
            context_lens=[done + new for _, (done, new) in items],
            block_tables=[
                list(range(1 + key * BLOCKS_EACH, 1 + (key + 1) * BLOCKS_EACH)) for key, _ in items
            ],
            block_tokens=SIZE,
        )
        total = sum(batch.query_lens)
        plain = PagedSdpa(self.plain, batch)
        attend = self.window.attend(batch, [key for key, _ in items])
        for layer in range(LAYERS):
            q, k, v = (
                torch.randn(total, heads, DIM, generator=self.random)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            torch.testing.assert_close(attend(layer, q, k, v), plain(layer, q, k, v))
        if isinstance(attend, WindowAttend):
            attend.finish()
        assert torch.equal(self.plain, self.windowed)
        return attend


def test_decodes_beside_prompts_attend_as_over_pages() -> None:
    model = Model()
    model.step({0: (0, 9), 1: (0, 5)})
    assert isinstance(model.step({0: (9, 1), 1: (5, 1), 2: (0, 7)}), WindowAttend)
    model.step({0: (10, 1), 1: (6, 1), 2: (7, 1)})
    model.step({1: (7, 1)})
    model.step({2: (8, 1), 1: (8, 1), 3: (0, 6)})


def test_a_long_context_beside_short_ones_stays_on_pages() -> None:
    model = Model()
    model.step({0: (0, 230), 1: (0, 3), 2: (0, 3), 3: (0, 3)})
    step = {0: (230, 1), 1: (3, 1), 2: (3, 1), 3: (3, 1)}
    assert isinstance(model.step(step), PagedSdpa)
    assert isinstance(model.step({0: (231, 1)}), WindowAttend)


def test_a_window_beyond_its_memory_is_not_made() -> None:
    model = Model(max_bytes=100)
    model.step({0: (0, 5)})
    assert isinstance(model.step({0: (5, 1)}), PagedSdpa)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_coming_and_going_attends_as_over_pages(data: st.DataObject) -> None:
    model, lengths = Model(), dict.fromkeys(range(6), 0)
    for _ in range(data.draw(st.integers(1, 12))):
        chosen = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=4))
        step = {}
        for key in chosen:
            new = 1 if lengths[key] else data.draw(st.integers(1, 70))
            step[key] = (lengths[key], new)
            lengths[key] += new
        model.step(step)
        gone = data.draw(st.sets(st.integers(0, 5), max_size=1))
        lengths.update(dict.fromkeys(gone, 0))  # preempted: computed again from the beginning


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
        sequence_ids_S=[40, 41],
    )
    for message in (step, dummy_step([1, 1], block_size=4)):
        got = decode(encode(message))
        assert isinstance(got, StepInput)
        for name in StepInput.__dataclass_fields__:
            assert np.array_equal(getattr(got, name), getattr(message, name)), name
    for other in (Allocate(77), Load(3, Path("/mnt/pvc/ä/b")), Clear(3)):
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
    (tmp_path / "memory.max").write_text("max")
    assert memory_available_bytes(tmp_path, meminfo) == 8000 * 1024
