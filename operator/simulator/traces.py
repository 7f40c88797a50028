"""Recorded traffic: when requests came and how long they were. Reads files, simulates nothing.

Formats, with the columns or keys that each must have:

* azure: Azure/AzurePublicDataset, CSV with TIMESTAMP, ContextTokens, GeneratedTokens
* mooncake: kvcache-ai/Mooncake, JSON lines with timestamp (ms), input_length, output_length and
  hash_ids (one for each 512 prompt tokens; equal beginnings are equal prompts)
* csv: columns arrival_s, prompt_tokens, output_tokens
* jsonl: keys arrival_s, prompt_tokens, output_tokens

Arrivals are counted from the first one, and sorted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path

PREFIX_BLOCK_TOKENS = 512  # what one of Mooncake's hash ids stands for


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    arrival_s: float  # since the first one
    prompt_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()  # one for each PREFIX_BLOCK_TOKENS of the prompt


class TraceFormat(StrEnum):
    """How a trace is written."""

    AZURE = "azure"
    MOONCAKE = "mooncake"
    CSV = "csv"
    JSONL = "jsonl"


class TraceError(ValueError):
    """A trace cannot be read; the text says where and what to change."""


def parse_format(name: str) -> TraceFormat:
    """Return the format of this name.

    Raises:
        TraceError: there is none.
    """
    try:
        return TraceFormat(name)
    except ValueError:
        raise TraceError(
            f"There is no trace format {name!r}. Choose one of: {', '.join(TraceFormat)}."
        ) from None


Row = Mapping[str, object]


def load_trace(path: Path, trace_format: TraceFormat) -> list[Request]:
    """Return the requests of a trace in order of arrival.

    Requests without prompt or output tokens are left out: BurstGPT and others write failures so.

    Raises:
        TraceError: the file is missing, empty or not of this format.
    """
    read_rows, parse = _READERS[trace_format]
    requests: list[Request] = []
    try:
        for number, row in read_rows(path):
            try:
                requests.append(parse(row))
            except KeyError as missing:
                raise TraceError(
                    f"{path.name}, line {number}: no field {missing}. Is its format really "
                    f"{trace_format}? The others are: {', '.join(TraceFormat)}."
                ) from None
            except (TypeError, ValueError, OverflowError) as error:
                raise TraceError(f"{path.name}, line {number}: {error}.") from None
    except FileNotFoundError:
        raise TraceError(f"There is no trace {path}.") from None
    except (UnicodeDecodeError, IsADirectoryError, csv.Error) as error:
        raise TraceError(f"{path.name} is not a text file: {error}.") from None
    return from_zero([r for r in requests if r.prompt_tokens > 0 and r.output_tokens > 0], path)


def from_zero(requests: list[Request], path: Path) -> list[Request]:
    """Sort requests and count their arrivals from the first.

    Raises:
        TraceError: there are none.
    """
    if not requests:
        raise TraceError(f"{path.name} holds no request with prompt and output tokens.")
    requests.sort(key=lambda request: request.arrival_s)
    first_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(newline="") as file:
        yield from enumerate(csv.DictReader(file), start=2)


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TraceError(f"{path.name}, line {number} is not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise TraceError(f"{path.name}, line {number} is not a JSON object.")
            yield number, row


def _azure(row: Row) -> Request:
    # Seven digits of a second, of which Python's datetime takes six.
    moment = datetime.fromisoformat(str(row["TIMESTAMP"])[:26])
    return Request(
        arrival_s=(moment - datetime(2000, 1, 1, tzinfo=moment.tzinfo)).total_seconds(),
        prompt_tokens=_count(row, "ContextTokens"),
        output_tokens=_count(row, "GeneratedTokens"),
    )


def _mooncake(row: Row) -> Request:
    ids = row["hash_ids"]
    if not isinstance(ids, list):
        raise TypeError("hash_ids is not a list")
    return Request(
        arrival_s=_number(row, "timestamp") / 1000,
        prompt_tokens=_count(row, "input_length"),
        output_tokens=_count(row, "output_length"),
        prefix_ids=tuple(int(one) for one in ids),
    )


def _plain(row: Row) -> Request:
    return Request(
        arrival_s=_number(row, "arrival_s"),
        prompt_tokens=_count(row, "prompt_tokens"),
        output_tokens=_count(row, "output_tokens"),
    )


def _number(row: Row, name: str) -> float:
    try:
        return float(str(row[name]))
    except ValueError:
        raise ValueError(f"{name} is {row[name]!r}, not a number") from None


def _count(row: Row, name: str) -> int:
    number = _number(row, name)
    if number < 0 or number != int(number):
        raise ValueError(f"{name} is {row[name]!r}, not a count of tokens")
    return int(number)


_READERS: dict[
    TraceFormat,
    tuple[Callable[[Path], Iterator[tuple[int, Row]]], Callable[[Row], Request]],
] = {
    TraceFormat.AZURE: (_csv_rows, _azure),
    TraceFormat.MOONCAKE: (_json_rows, _mooncake),
    TraceFormat.CSV: (_csv_rows, _plain),
    TraceFormat.JSONL: (_json_rows, _plain),
}
