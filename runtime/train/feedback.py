"""What people said about answers, as a deployment's feedback log keeps it, becomes training rows.

The log is a folder of JSON-lines files that only grow; docs/reference/feedback.md has the records.
A job reads those up to a time, so that it sees the same ones in every generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mizzen.runtime.train.errors import (
    DatasetEmptyError,
    DatasetFormatUnknownError,
    DatasetNotFoundError,
)
from mizzen.runtime.train.options import Part
from mizzen.runtime.train.records import Shape

Row = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]


class Turn(Part):
    """One turn of the conversation before the answer."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _Record(Part):
    """What all records have; `at` is UTC to the second, so that times sort as text."""

    id: Text
    at: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")
    messages: tuple[Turn, ...] = Field(min_length=1)

    @property
    def turns(self) -> list[Row]:
        """The conversation as rows have it."""
        return [turn.model_dump() for turn in self.messages]


class Vote(_Record):
    """An answer that somebody liked or did not."""

    type: Literal["vote"]
    answer: Text
    vote: Literal["up", "down"]


class Regenerated(_Record):
    """Answers to the same conversation, of which somebody kept one."""

    type: Literal["regenerated"]
    answers: tuple[Text, ...] = Field(min_length=2)
    chosen: int = Field(ge=0)

    @model_validator(mode="after")
    def _chosen_is_there(self) -> Regenerated:
        if self.chosen >= len(self.answers):
            raise ValueError(f"chosen is {self.chosen}, and answers has {len(self.answers)}")
        return self


class Reviewed(_Record):
    """An answer as a reviewer left it."""

    type: Literal["reviewed"]
    answer: Text


Record = Annotated[Vote | Regenerated | Reviewed, Field(discriminator="type")]
_RECORDS: TypeAdapter[Vote | Regenerated | Reviewed] = TypeAdapter(Record)

_WANTED: dict[Shape, str] = {
    "conversation": "a reviewed answer",
    "judgement": "a vote or a regenerated answer",
    "preference": "a regenerated answer, or an up and a down vote on one conversation",
    "prompt": "a record",
}


@dataclass(frozen=True, slots=True)
class Placed:
    """A record and where it stands."""

    place: str
    record: Vote | Regenerated | Reviewed


def read_feedback(
    name: str, folder: Path, *, until: str | None, shape: Shape
) -> list[tuple[str, Row]]:
    """Return the rows of a shape that a log holds up to a time, with the place of each.

    Raises:
        DatasetError: the folder is not there, a line is no record, or nothing is of use.
    """
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise DatasetNotFoundError(
            name, f"{folder} cannot be read ({error.strerror}). Check dataset.feedbackRef."
        ) from error
    logs = [path for path in files if path.suffix == ".jsonl"]
    records = [placed for path in logs for placed in _records(name, path)]
    kept = [one for one in records if until is None or one.record.at <= until]
    rows = list(_rows(kept, shape))
    if not rows:
        raise DatasetEmptyError(
            name, f"{len(kept)} records of {folder} hold not once {_WANTED[shape]}."
        )
    return rows


def _records(name: str, path: Path) -> Iterator[Placed]:
    # What follows the last line break is still being written.
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        place = f"{path.name} line {number}"
        if not line.strip():
            continue
        try:
            yield Placed(place, _RECORDS.validate_json(line))
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in fault["loc"])
            said = f"{where}: {fault['msg']}" if where else fault["msg"]
            raise DatasetFormatUnknownError(
                name, f"{place} is no feedback record ({said}). Mend the line or take it out."
            ) from error


def _rows(records: Sequence[Placed], shape: Shape) -> Iterator[tuple[str, Row]]:
    if shape == "prompt":
        for placed in records:
            yield placed.place, {"messages": placed.record.turns}
    elif shape == "conversation":
        for placed in records:
            if isinstance(placed.record, Reviewed):
                answer = {"role": "assistant", "content": placed.record.answer}
                yield placed.place, {"messages": [*placed.record.turns, answer]}
    else:
        yield from _regenerated(records)
        yield from _votes(records) if shape == "judgement" else _paired_votes(records)


def _regenerated(records: Iterable[Placed]) -> Iterator[tuple[str, Row]]:
    """Yield the kept answer beside each of the others."""
    for placed in records:
        if isinstance(record := placed.record, Regenerated):
            chosen = record.answers[record.chosen]
            for rejected in record.answers:
                if rejected != chosen:
                    yield placed.place, _preference(record, chosen, rejected)


def _votes(records: Iterable[Placed]) -> Iterator[tuple[str, Row]]:
    """Yield every answer that somebody voted on, by itself."""
    for placed in records:
        if isinstance(record := placed.record, Vote):
            messages = [*record.turns, {"role": "assistant", "content": record.answer}]
            yield placed.place, {"messages": messages, "label": record.vote == "up"}


def _paired_votes(records: Iterable[Placed]) -> Iterator[tuple[str, Row]]:
    """Yield a liked answer beside one that was not; a vote without a counterpart says too little.

    Only votes on the very same conversation are of one question.
    """
    liked: dict[str, list[Placed]] = {}
    disliked: dict[str, list[Placed]] = {}
    for placed in records:
        if isinstance(record := placed.record, Vote):
            side = liked if record.vote == "up" else disliked
            side.setdefault(json.dumps(record.turns, sort_keys=True), []).append(placed)
    for conversation, ups in liked.items():
        for up, down in zip(ups, disliked.get(conversation, ()), strict=False):
            assert isinstance(up.record, Vote) and isinstance(down.record, Vote)
            if up.record.answer != down.record.answer:
                yield up.place, _preference(up.record, up.record.answer, down.record.answer)


def _preference(record: _Record, chosen: str, rejected: str) -> Row:
    return {"prompt": record.turns, "chosen": chosen, "rejected": rejected}
