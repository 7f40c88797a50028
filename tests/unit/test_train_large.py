"""The large path without Ray: whatever is read, it is what the small path would have made of it."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.train import preparing
from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.errors import DatasetError, EngineMissingError, JobConfigError
from mizzen.runtime.train.large.blocks import Block
from mizzen.runtime.train.large.mapped import ItemFile, MappedItems, encode
from mizzen.runtime.train.large.prepare import Outcome, prepare_large
from mizzen.runtime.train.large.work import LOWEST_KEYS, BlockReader
from mizzen.runtime.train.preparing import (
    LARGE_BYTES,
    choose_engine,
    count_workers,
    measure_files,
    prepare_data,
)
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.samples import Item, Pair, Prompt, Rating, Sample
from tests.fixtures.prepared_data import SETS, assert_same, write_set

BLOCK_BYTES = 700


def in_process(work: Callable[[Block], Outcome], blocks: Sequence[Block]) -> Iterator[Outcome]:
    return map(work, blocks)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tiny_model(tmp_path_factory.mktemp("model")))


def both(
    datasets: tuple[Dataset, ...], tokenizer: Tokenizer, rules: Processing, shape: Shape
) -> tuple[Prepared, Prepared]:
    reader = BlockReader(datasets=datasets, rules=rules, shape=shape)
    large = prepare_large(reader, tokenizer, in_process, block_bytes=BLOCK_BYTES)
    return prepare_data(datasets, tokenizer, rules, shape, pod=None), large


@pytest.mark.parametrize("rules", [
    Processing(max_seq_len=96, holdout_ratio=0.2),
    Processing(max_seq_len=64, holdout_ratio=0.1, on_overlong="drop", loss_on="all"),
    Processing(max_seq_len=256, holdout_ratio=0.0),
    Processing(max_seq_len=96, holdout_ratio=1e-9),
], ids=["cut", "drop", "no holdout", "one held out"])  # fmt: skip
@pytest.mark.parametrize("name", SETS)
def test_the_outcome_is_the_small_paths(
    tmp_path: Path, tokenizer: Tokenizer, name: str, rules: Processing
) -> None:
    datasets, shape = write_set(tmp_path, name)
    small, large = both(datasets, tokenizer, rules, shape)
    assert_same(small, large)
    assert isinstance(large.train[0], MappedItems)


def test_the_holdout_of_more_samples_than_decide_it_is_the_same(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """With more samples than are looked at, and wording that just too many of them share."""
    wording = " ".join(f"word{n}" for n in range(14))
    rows = [
        {"prompt": f"{n} {wording if n % 170 == 0 else n * 7} ok", "completion": f"{n % 9}"}
        for n in range(2 * LOWEST_KEYS)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    datasets = (Dataset(name="many", path=path),)
    for ratio in (0.02, 0.3, 0.9):
        rules = Processing(max_seq_len=64, holdout_ratio=ratio)
        assert_same(*both(datasets, tokenizer, rules, "conversation"))


GOOD = json.dumps({"prompt": "hi", "completion": "ho"})
LONG = json.dumps({"prompt": "q" * 99, "completion": "a"})
USER = json.dumps({"messages": [{"role": "user", "content": "alone"}]})
MANY = "\n".join([GOOD.replace("hi", f"hi {n}") for n in range(40)])

REFUSED: dict[str, tuple[str | bytes | None, ...]] = {
    "a missing file": (MANY, None),
    "an empty file": (MANY, ""),
    "a file of blank lines": ("\n \n\n", MANY),
    "a line that is not JSON": (f"{MANY}\n\n{{'single': 1}}\n{MANY}",),
    "two bad lines, of which the first counts": (f"{MANY}\n[1]\n{MANY}\nnot JSON",),
    "a line that is not UTF-8": (MANY.encode() + b'\n{"a": "\xff"}',),
    "an item of an array": (f"[{GOOD}, 7]",),
    "a cut array": (f"[{GOOD},\n",),
    "a bad row before a missing file": (f"{MANY}\n7", None),
    "an empty file before a bad row": ("", f"{MANY}\n7"),
    "a bad row of the second before the first says nothing": (USER, "7"),
    "nothing from the assistant": (MANY, USER),
    "all too long": (LONG, MANY),
    "all held out": (f"{GOOD}\n{GOOD}",),
}  # fmt: skip


@pytest.mark.parametrize("contents", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_with_the_same_words(
    tmp_path: Path, tokenizer: Tokenizer, contents: tuple[str | bytes | None, ...]
) -> None:
    datasets = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.jsonl"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        datasets.append(Dataset(name=f"d{number}", path=path))
    rules = Processing(max_seq_len=48, holdout_ratio=1e-9)
    with pytest.raises(DatasetError) as small:
        prepare_data(tuple(datasets), tokenizer, rules, "conversation", pod=None)
    reader = BlockReader(datasets=tuple(datasets), rules=rules, shape="conversation")
    with pytest.raises(type(small.value), match=re.escape(str(small.value))):
        prepare_large(reader, tokenizer, in_process, block_bytes=BLOCK_BYTES)


def test_a_wrong_digest_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for content in (MANY, f"[{GOOD}]"):
        path = tmp_path / "d.jsonl"
        path.write_text(content)
        dataset = Dataset(name="d", path=path, sha256="0" * 64)
        reader = BlockReader(datasets=(dataset,), rules=Processing(), shape="conversation")
        with pytest.raises(DatasetError, match=r"its sha256 is .* and the job expects 000"):
            prepare_large(reader, tokenizer, in_process)


def test_nothing_is_left_of_the_scratch_folder(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, shape = write_set(tmp_path, "chat")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    _, large = both(datasets, tokenizer, Processing(max_seq_len=96), shape)
    assert not list(scratch.iterdir())
    assert len(list(large.train[0])) == len(large.train[0]) > 0, "it is still there to be read"


def sample(size: int, seed: int) -> Sample:
    random = np.random.RandomState(seed)
    return Sample(random.randint(0, 2**31 - 1, size).astype(np.int32), random.rand(size) < 0.5)


def test_items_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    blocks: list[list[Item]] = [
        [sample(5, 1), sample(1, 2)],
        [],
        [Pair(sample(3, 3), sample(4, 4)), Rating(sample(2, 5), True), Rating(sample(2, 6), False)],
        [Prompt(sample(3, 7).token_ids_T), Prompt(sample(0, 8).token_ids_T, ""),
         Prompt(sample(1, 9).token_ids_T, "\ud83d half")],
    ]  # fmt: skip
    with ItemFile(tmp_path / "items") as file:
        for block in blocks:
            file.append(encode(block))
    items = MappedItems(tmp_path / "items")
    expected = [item for block in blocks for item in block]
    assert len(items) == len(expected)
    assert list(map(described, items)) == list(map(described, expected))
    assert described(items[-1]) == described(expected[-1])
    assert list(map(described, items[1:3])) == list(map(described, expected[1:3]))
    with pytest.raises(IndexError):
        items[len(expected)]


def described(item: Any) -> object:
    match item:
        case Sample():
            token_ids_T, is_label_T = item.token_ids_T, item.is_label_T
            return "sample", token_ids_T.dtype, token_ids_T.tolist(), is_label_T.tolist()
        case Pair():
            return "pair", described(item.chosen), described(item.rejected)
        case Rating():
            return "rating", described(item.sample), item.is_liked
    return "prompt", item.token_ids_T.tolist(), item.answer


CHOICES: dict[str, tuple[Any, int, tuple[str, ...], str]] = {
    "little data stays in the process": ("Auto", LARGE_BYTES - 1, (), "InProcess"),
    "much data goes to Ray": ("Auto", LARGE_BYTES, (), "Ray"),
    "much data stays where Ray Data is not there": ("Auto", LARGE_BYTES, ("ray",), "InProcess"),
    "little data goes where it is told": ("Ray", 0, (), "Ray"),
    "much data stays where it is told": ("InProcess", LARGE_BYTES, (), "InProcess"),
}


@pytest.mark.parametrize(("wanted", "size", "missing", "chosen"), CHOICES.values(), ids=CHOICES)
def test_which_engine(wanted: Any, size: int, missing: tuple[str, ...], chosen: str) -> None:
    assert choose_engine(wanted, data_bytes=size, missing=missing) == chosen


def test_ray_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineMissingError, match=r"needs pandas and ray\..*'mizzen\[data\]'"):
        choose_engine("Ray", data_bytes=0, missing=("pandas", "ray"))


def test_a_replica_that_lends_starts_no_ray(tmp_path: Path, tokenizer: Tokenizer) -> None:
    datasets, shape = write_set(tmp_path, "chat")
    with pytest.raises(JobConfigError, match=r"engine Ray needs a pod .* leave mode: Loan out"):
        prepare_data(datasets, tokenizer, Processing(engine="Ray"), shape, pod=None)


def test_large_data_without_ray_says_so(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    datasets, shape = write_set(tmp_path, "chat")
    monkeypatch.setattr(preparing, "LARGE_BYTES", 1)
    monkeypatch.setattr(preparing, "_PACKAGES", ("ray", "no_such_package"))
    prepare_data(datasets, tokenizer, Processing(max_seq_len=96), shape, pod=preparing.Pod(None))  # type: ignore[arg-type]
    assert "are prepared in this process, as no_such_package is missing." in caplog.text


def test_files_are_measured_together(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    for path, size in ((tmp_path / "a", 5), (log / "1.jsonl", 7), (log / "2.jsonl", 11)):
        path.write_bytes(b"x" * size)
    datasets = (
        Dataset(name="a", path=tmp_path / "a"),
        Dataset(name="missing", path=tmp_path / "b"),
        Dataset(name="far", url="http://example.invalid/c"),
        Dataset(name="log", feedback=log),
    )
    assert measure_files(datasets) == 23


def test_a_worker_for_each_cpu_that_has_memory() -> None:
    gib = 1 << 30
    assert count_workers(cpus=8, limit_bytes=64 * gib) == 8
    assert count_workers(cpus=8, limit_bytes=4 * gib) == 3
    assert count_workers(cpus=8, limit_bytes=gib // 2) == 1
