"""What the trainer reads, what it refuses and with which words, and in which order it goes."""

import errno
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hack.datasets import write_chatterbot
from mizzen.runtime.train import sources
from mizzen.runtime.train.batches import SampleOrder, pack, total_steps
from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.data import Prepared, choose_holdout, prepare
from mizzen.runtime.train.errors import DatasetError, DatasetUnreachableError
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.sources import Source, load_source, open_dataset

END = 0
Messages = Sequence[Mapping[str, Any]]


class LetterRenderer:
    """One token for each letter, and one that ends a turn."""

    def __init__(self, *, ends_turns: bool = True) -> None:
        self.eos_token_ids = (END,)
        self._ends_turns = ends_turns

    def render_for_training(self, messages: Messages) -> tuple[list[int], list[bool]]:
        token_ids: list[int] = []
        mask: list[bool] = []
        for message in messages:
            letters = [ord(letter) for letter in message["content"]]
            letters += [END] if self._ends_turns else []
            token_ids += letters
            mask += [message["role"] == "assistant"] * len(letters)
        return token_ids, mask


def dataset(path: Path, content: str | bytes, **fields: Any) -> Dataset:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Dataset(name="tickets", path=path, **fields)


def read(path: Path, content: str | bytes, **fields: Any) -> Source:
    return load_source(dataset(path, content, **fields), default_format="auto")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


GOOD = json.dumps(chat("hi", "ho"))

READABLE = {
    "messages as JSON lines": f"{GOOD}\n{GOOD}\n",
    "messages as a JSON array": f"[{GOOD}, {GOOD}]",
    "prompt and completion": '{"prompt": "hi", "completion": "ho"}\n' * 2,
    "both forms in one file": f'{GOOD}\n{{"prompt": "hi", "completion": "ho"}}',
    "blank lines and Windows line ends": f"\r\n{GOOD}\r\n\r\n{GOOD}\r\n",
    "a byte order mark": f"\ufeff{GOOD}\n{GOOD}",
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
def test_reads(tmp_path: Path, content: str) -> None:
    source = read(tmp_path / "d.jsonl", content)
    turns = [[m["content"] for m in c.messages] for c in source.conversations]
    assert turns == [["hi", "ho"], ["hi", "ho"]]


REFUSED = {
    "an empty file": ("", "DatasetEmpty", "the file holds no sample."),
    "an empty array": ("[]", "DatasetEmpty", "the file holds no sample."),
    "a line that is not JSON": (
        f"{GOOD}\n\n{{'single': 1}}",
        "DatasetNotJson",
        "line 3 is not JSON: Expecting property name enclosed in double quotes at column 2.",
    ),
    "a cut array": (
        f"[{GOOD},\n",
        "DatasetNotJson",
        "line 2 is not JSON: Expecting value at column 1.",
    ),
    "a line that is not UTF-8": (
        GOOD.encode() + b'\n{"a": "\xff"}',
        "DatasetNotJson",
        "line 2 is not UTF-8.",
    ),
    "a number": ("7", "DatasetFormatUnknown", "line 1 is not a JSON object."),
    "unknown keys": (
        f'{GOOD}\n{{"text": "x", "id": 1}}',
        "DatasetFormatUnknown",
        'line 2 has neither "messages" nor "prompt" and "completion"; its keys are text, id.',
    ),
    "no messages": (
        '[{"messages": []}]',
        "DatasetFormatUnknown",
        'item 1: "messages" must be a non-empty list.',
    ),
    "an unknown role": (
        '{"messages": [{"role": "bot", "content": "x"}]}',
        "DatasetFormatUnknown",
        "line 1: messages[0] needs a role out of system, user, assistant, tool.",
    ),
    "content that is not text": (
        '{"messages": [{"role": "user", "content": 7}]}',
        "DatasetFormatUnknown",
        "line 1: messages[0] needs its content as a string.",
    ),
}


@pytest.mark.parametrize(("content", "reason", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses(tmp_path: Path, content: str | bytes, reason: str, text: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path / "d.jsonl", content)
    assert caught.value.reason == reason
    assert str(caught.value) == f"dataset tickets: {text}"


def test_a_fixed_form_is_insisted_on(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match='line 1 has no "prompt" and "completion"'):
        read(tmp_path / "d.jsonl", GOOD, format="promptCompletion")


def test_a_missing_file_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"No such file or directory.*Check dataset.uri"
    ) as caught:
        load_source(Dataset(name="tickets", path=tmp_path / "none"), default_format="auto")
    assert caught.value.reason == "DatasetNotFound"


def test_other_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    right = read(tmp_path / "d.jsonl", GOOD)
    assert read(tmp_path / "d.jsonl", GOOD, sha256=f"sha256:{right.digest}").digest == right.digest
    with pytest.raises(DatasetError, match="Restore the file or correct") as caught:
        read(tmp_path / "d.jsonl", GOOD + "\n", sha256=right.digest)
    assert caught.value.reason == "DatasetDigestMismatch"


class Server(BaseHTTPRequestHandler):
    """Answers with what the path asks for; `/flaky` is well at the third attempt."""

    flaky_requests = 0

    def do_GET(self) -> None:
        status = {"/good": 200, "/gone": 404, "/broken": 500}.get(self.path, 0)
        if self.path == "/flaky":
            Server.flaky_requests += 1
            status = 200 if Server.flaky_requests == 3 else 503
        status = 200 if self.path == "/short" else status
        self.send_response(status)
        if self.path == "/short":
            self.send_header("Content-Length", str(len(GOOD) + 1))
        self.end_headers()
        self.wfile.write(GOOD.encode() if status == 200 else b"")

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture
def server_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(sources.time, "sleep", lambda _: None)
    Server.flaky_requests = 0
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", ["/good", "/flaky"])
def test_reads_from_a_server_that_has_it(server_url: str, path: str) -> None:
    source = load_source(Dataset(name="t", url=server_url + path), default_format="auto")
    assert len(source.conversations) == 1


def test_a_file_that_ends_early_is_not_taken_for_the_whole(server_url: str) -> None:
    short = Dataset(name="t", url=f"{server_url}/short")
    with pytest.raises(DatasetUnreachableError, match="ends before all of the file has come"):
        load_source(short, default_format="auto")


def test_a_full_disk_is_not_taken_for_a_server_in_trouble(
    server_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Dataset(name="t", url=f"{server_url}/good")
    with open_dataset(good, tmp_path / "kept") as file:
        assert file.read() == GOOD.encode()

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources.shutil, "copyfileobj", fill)
    with pytest.raises(OSError, match="No space left"), open_dataset(good, tmp_path / "kept"):
        pass


def test_a_server_that_has_no_such_file_ends_the_job(server_url: str) -> None:
    with pytest.raises(DatasetError, match="/gone answers 404") as caught:
        load_source(Dataset(name="t", url=f"{server_url}/gone"), default_format="auto")
    assert caught.value.reason == "DatasetNotFound"


def test_a_server_in_trouble_lets_the_job_try_again_later(server_url: str) -> None:
    with pytest.raises(DatasetUnreachableError, match="/broken answers 500, also after 4 attempts"):
        load_source(Dataset(name="t", url=f"{server_url}/broken"), default_format="auto")
    nobody = Dataset(name="t", url="http://127.0.0.1:1/x")
    with pytest.raises(DatasetUnreachableError, match="cannot be reached"):
        load_source(nobody, default_format="auto")


def chats(path: Path, count: int, **fields: Any) -> Source:
    content = "\n".join(json.dumps(chat(f"q{i}", f"a{i}")) for i in range(count))
    return read(path, content, **fields)


def prepared(source: Source, *, renderer: LetterRenderer | None = None, **rules: Any) -> Prepared:
    rules = {"max_seq_len": 64, "holdout_ratio": 0.0, **rules}
    return prepare([source], renderer or LetterRenderer(), Processing(**rules))


def test_only_the_assistants_tokens_are_labels_and_its_end_is_one(tmp_path: Path) -> None:
    data = prepared(read(tmp_path / "d", GOOD))
    assert data.train[0][0].token_ids_T.tolist() == [*b"hi", END, *b"ho", END]
    assert data.train[0][0].is_label_T.tolist() == [False, False, False, True, True, True]


def test_all_tokens_but_the_first_are_labels_if_asked(tmp_path: Path) -> None:
    data = prepared(read(tmp_path / "d", GOOD), loss_on="all")
    assert data.train[0][0].is_label_T.tolist() == [False, True, True, True, True, True]


def test_too_long_samples_are_cut_or_dropped_and_counted(tmp_path: Path) -> None:
    # 13 letters and two ends; an answer behind the limit; one that fits.
    lines = [chat("q" * 3, "a" * 10), chat("q" * 12, "a"), chat("q", "a")]
    source = read(tmp_path / "d", "\n".join(map(json.dumps, lines)))
    cut = prepared(source, max_seq_len=10)
    assert (cut.samples, cut.truncated, cut.dropped) == (2, 1, 1)
    assert max(map(len, cut.train[0])) == 10
    dropped = prepared(source, max_seq_len=10, on_overlong="drop")
    assert (dropped.samples, dropped.truncated, dropped.dropped) == (1, 0, 2)


def test_data_that_teaches_nothing_is_refused(tmp_path: Path) -> None:
    silent = '{"messages": [{"role": "user", "content": "hi"}]}'
    with pytest.raises(DatasetError, match="none of its 1 samples has an assistant turn") as caught:
        prepared(read(tmp_path / "d", silent))
    assert caught.value.reason == "DatasetNoAssistantTurns"
    with pytest.raises(DatasetError, match=r"longer than 8 tokens. Raise processing.maxSeqLen"):
        prepared(read(tmp_path / "d", json.dumps(chat("q" * 9, "a"))), max_seq_len=8)


def test_data_that_never_ends_a_turn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="the model would never stop talking") as caught:
        prepared(read(tmp_path / "d", GOOD), renderer=LetterRenderer(ends_turns=False))
    assert caught.value.reason == "DatasetNeverStops"


def keys(source: Source) -> list[bytes]:
    return [conversation.key for conversation in source.conversations]


def test_the_holdout_follows_from_content_alone(tmp_path: Path) -> None:
    some, more = chats(tmp_path / "a", 100), chats(tmp_path / "b", 200)
    held, held_of_more = choose_holdout(keys(some), 0.2), choose_holdout(keys(more), 0.2)
    assert 10 <= len(held) <= 30
    assert held == held_of_more & {c.key for c in some.conversations}
    assert held_of_more == choose_holdout([*keys(more), *keys(some)], 0.2)


def test_no_held_out_sample_is_trained_on_even_from_another_dataset(tmp_path: Path) -> None:
    twice = [chats(tmp_path / "a", 50), chats(tmp_path / "b", 50)]
    rules = Processing(max_seq_len=64, holdout_ratio=0.3)
    data = prepare(twice, LetterRenderer(), rules)
    held = {s.token_ids_T.tobytes() for s in data.holdout}
    trained = {s.token_ids_T.tobytes() for samples in data.train for s in samples}
    assert len(held) == len(data.holdout) > 0
    assert not held & trained
    assert len(held | trained) == 50


def test_a_few_samples_still_give_a_holdout(tmp_path: Path) -> None:
    data = prepared(chats(tmp_path / "d", 3), holdout_ratio=0.001)
    assert (data.samples, len(data.holdout)) == (2, 1)


def test_the_package_of_dialogues_is_a_dataset(tmp_path: Path) -> None:
    count = write_chatterbot(tmp_path / "chat.jsonl", limit=300)
    source = load_source(Dataset(name="c", path=tmp_path / "chat.jsonl"), default_format="auto")
    assert count == len(source.conversations) == 300
    assert all(c.messages[-1]["role"] == "assistant" for c in source.conversations)


def numbered(*sizes: int, weights: tuple[float, ...] | None = None) -> Prepared:
    """Datasets whose samples are single numbers: 0.., 100.., 200.."""
    train = tuple(
        tuple(
            Sample(np.asarray([100 * place + i], np.int32), np.asarray([False]))
            for i in range(size)
        )
        for place, size in enumerate(sizes)
    )
    weights = weights or tuple(1.0 for _ in sizes)
    return Prepared(
        train=train, weights=weights, holdout=(), truncated=0, dropped=0, digest="digest"
    )


def taken(order: SampleOrder, counter: int, count: int) -> list[int]:
    return [int(sample.token_ids_T[0]) for sample in order.take(counter, count)]


@settings(deadline=None)
@given(seed=st.integers(0, 2**31 - 1), cut=st.integers(0, 30), batch=st.integers(1, 7))
def test_the_order_is_a_function_of_the_counter(seed: int, cut: int, batch: int) -> None:
    data = numbered(5, 4)
    whole = taken(SampleOrder(data, seed=seed), 0, 40)
    order = SampleOrder(data, seed=seed)
    assert taken(order, cut, batch) == whole[cut : cut + batch]
    assert taken(order, 0, batch) == whole[:batch]
    for epoch in range(4):
        assert sorted(whole[epoch * 9 : epoch * 9 + 9]) == [0, 1, 2, 3, 4, 100, 101, 102, 103]


def test_epochs_and_seeds_differ_in_order() -> None:
    data = numbered(50)
    order = SampleOrder(data, seed=1)
    assert taken(order, 0, 50) != taken(order, 50, 50)
    assert taken(order, 0, 50) != taken(SampleOrder(data, seed=2), 0, 50)


def test_a_weight_says_how_often_a_sample_comes_per_epoch() -> None:
    order = SampleOrder(numbered(4, 4, weights=(2.0, 0.5)), seed=0)
    epoch = taken(order, 0, order.epoch_samples)
    assert order.epoch_samples == 10
    assert [epoch.count(i) for i in range(4)] == [2, 2, 2, 2]
    assert sum(epoch.count(100 + i) for i in range(4)) == 2


STEPS = {
    "a part of a batch is a step": ({"epochs": 1.0, "max_steps": None}, 3),
    "two epochs share a batch where they meet": ({"epochs": 2.0, "max_steps": None}, 5),
    "less than an epoch": ({"epochs": 0.1, "max_steps": None}, 1),
    "the limit overrules epochs, down": ({"epochs": 9.0, "max_steps": 2}, 2),
    "the limit overrules epochs, up": ({"epochs": 1.0, "max_steps": 50}, 50),
}


@pytest.mark.parametrize(("limits", "expected"), STEPS.values(), ids=STEPS)
def test_total_steps(limits: dict[str, Any], expected: int) -> None:
    assert total_steps(epoch_samples=9, batch_size=4, **limits) == expected


def test_packing_predicts_each_label_from_the_token_before_it_in_its_own_sample() -> None:
    first = Sample(np.asarray([1, 2, 3], np.int32), np.asarray([False, False, True]))
    second = Sample(np.asarray([4, 5], np.int32), np.asarray([False, True]))
    batch = pack([first, second], torch.device("cpu"))
    assert batch.token_ids_T.tolist() == [1, 2, 3, 4, 5]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.lengths == (3, 2)
    assert list(zip(batch.source_N.tolist(), batch.target_N.tolist(), strict=True)) == [
        (1, 3),
        (3, 5),
    ]
