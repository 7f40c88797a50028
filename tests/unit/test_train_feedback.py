"""A deployment's feedback log becomes rows to learn from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mizzen.runtime.train.config import Dataset
from mizzen.runtime.train.errors import (
    DatasetEmptyError,
    DatasetFormatUnknownError,
    DatasetNotFoundError,
)
from mizzen.runtime.train.records import Shape
from mizzen.runtime.train.sources import Source, load_source

Row = dict[str, Any]
HI = [{"role": "user", "content": "Hi"}]
REFERENCE = Path(__file__).parents[2] / "docs/reference/feedback.md"


def record(kind: str, at: str = "12:00:00", messages: list[Row] = HI, **fields: Any) -> Row:
    return {"type": kind, "id": "1", "at": f"2026-01-01T{at}Z", "messages": messages, **fields}


UP = record("vote", answer="Hello!", vote="up")
DOWN = record("vote", answer="What?", vote="down")
KEPT = record("regenerated", answers=["What?", "Hello!", "Hm."], chosen=1)
REVIEWED = record("reviewed", answer="Hello, how can I help?")


def write(folder: Path, *records: Row, name: str = "a.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def load(folder: Path, shape: Shape = "conversation", until: str | None = None) -> Source:
    dataset = Dataset(name="said", feedback=folder, until=until)
    return load_source(dataset, default_format="auto", shape=shape)


def said(source: Source) -> list[tuple[str, str | None]]:
    """The last turns of each sample, of preferences those of both sides."""
    return [
        (c.messages[-1]["content"], c.rejected[-1]["content"] if c.rejected else None)
        for c in source.conversations
    ]


def test_reviewed_answers_are_rows_of_their_own(tmp_path: Path) -> None:
    source = load(write(tmp_path / "log", UP, DOWN, KEPT, REVIEWED))
    assert said(source) == [("Hello, how can I help?", None)]
    assert source.conversations[0].messages[0] == HI[0]
    assert source.conversations[0].place == "a.jsonl line 4"


def test_a_kept_answer_is_preferred_to_each_of_the_others(tmp_path: Path) -> None:
    source = load(write(tmp_path / "log", KEPT, REVIEWED), "preference")
    assert said(source) == [("Hello!", "What?"), ("Hello!", "Hm.")]


def test_votes_on_one_conversation_make_a_preference_and_single_ones_none(tmp_path: Path) -> None:
    other = record("vote", messages=[{"role": "user", "content": "Bye"}], answer="No.", vote="down")
    source = load(write(tmp_path / "log", DOWN, other, UP), "preference")
    assert said(source) == [("Hello!", "What?")]
    with pytest.raises(DatasetEmptyError, match=r"2 records of .* hold not once a regenerated"):
        load(write(tmp_path / "single", UP, other), "preference")


def test_a_reward_is_learned_from_every_vote_and_from_regenerated_answers(tmp_path: Path) -> None:
    source = load(write(tmp_path / "log", UP, KEPT, DOWN, REVIEWED), "judgement")
    assert said(source) == [
        ("Hello!", "What?"), ("Hello!", "Hm."), ("Hello!", None), ("What?", None),
    ]  # fmt: skip
    assert [c.is_liked for c in source.conversations] == [None, None, True, False]
    assert source.conversations[3].place == "a.jsonl line 3"
    with pytest.raises(DatasetEmptyError, match=r"hold not once a vote or a regenerated answer"):
        load(write(tmp_path / "reviewed", REVIEWED), "judgement")


def test_every_record_is_a_prompt(tmp_path: Path) -> None:
    source = load(write(tmp_path / "log", UP, KEPT, REVIEWED), "prompt")
    assert [conversation.messages for conversation in source.conversations] == [tuple(HI)] * 3


def test_what_is_said_later_changes_nothing_for_a_job_that_goes_on(tmp_path: Path) -> None:
    folder, until = write(tmp_path / "log", REVIEWED), "2026-01-01T12:30:00Z"
    before = load(folder, until=until)
    later = record("reviewed", at="13:00:00", answer="Later.")
    write(folder, later, name="b.jsonl")
    assert load(folder, until=until) == before
    assert len(load(folder).conversations) == 2
    assert load(folder).digest != before.digest


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "log", REVIEWED)
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"type": "revi')
    (folder / "notes.txt").write_text("not a log")
    assert len(load(folder).conversations) == 1


MALFORMED = {
    "no JSON": ("{", "Invalid JSON"),
    "another type": (json.dumps(record("flag")), "'flag' found using 'type'"),
    "a field too many": (json.dumps({**UP, "mood": "good"}), "vote.mood: Extra inputs"),
    "no answer": (json.dumps(record("reviewed")), "reviewed.answer: Field required"),
    "a choice that is not there": (
        json.dumps({**KEPT, "chosen": 3}), "chosen is 3, and answers has 3"),
    "a time without a zone": (json.dumps({**UP, "at": "2026-01-01 12:00"}), "vote.at: String"),
    "an unknown role": (
        json.dumps({**UP, "messages": [{"role": "cat", "content": ""}]}), "messages.0.role"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "fault"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_refused_with_its_number(tmp_path: Path, line: str, fault: str) -> None:
    folder = write(tmp_path / "log", REVIEWED)
    with (folder / "a.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(DatasetFormatUnknownError, match=r"said: a\.jsonl line 3 is no") as refused:
        load(folder)
    assert fault in str(refused.value)


def test_a_log_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"Check dataset\.feedbackRef"):
        load(tmp_path / "none")


def test_the_reference_pages_examples_are_records(tmp_path: Path) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", REFERENCE.read_text(), flags=re.DOTALL)
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "a.jsonl").write_text(block)
    assert len(load(folder, "prompt").conversations) == 3
    assert said(load(folder)) == [("Hello, how can I help?", None)]
