"""A dataset's bytes, from a file or over HTTP, become conversations. Knows nothing of tokens.

Read as JSON lines or as one JSON array; what an object means is `records`' affair.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mizzen.runtime.train.config import Dataset
from mizzen.runtime.train.durable import FULL
from mizzen.runtime.train.errors import (
    DatasetDigestMismatchError,
    DatasetEmptyError,
    DatasetNotFoundError,
    DatasetNotJsonError,
    DatasetUnreachableError,
)
from mizzen.runtime.train.feedback import read_feedback
from mizzen.runtime.train.records import Conversation, Format, RecordReader, Shape

FETCH_ATTEMPTS = 4
FETCH_TIMEOUT_S = 30
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset as read: its conversations and the digest of its bytes."""

    dataset: Dataset
    conversations: tuple[Conversation, ...]
    digest: str
    shape: Shape


def load_source(
    dataset: Dataset, *, default_format: Format, shape: Shape = "conversation"
) -> Source:
    """Read a dataset from its file or URL, as samples of the shape a method learns from.

    Raises:
        DatasetError: the bytes are missing, are not those announced, or are no conversations.
        DatasetUnreachableError: the server did not answer in several attempts.
    """
    reader = RecordReader(dataset.name, shape=shape, form=dataset.format or default_format)
    if dataset.feedback is not None:
        rows, digest = load_feedback(dataset, shape)
    else:
        with open_dataset(dataset) as file:
            raw = file.read()
        digest = hashlib.sha256(raw).hexdigest()
        check_digest(dataset, digest)
        rows = _parse(dataset.name, raw)
    conversations = tuple(reader.read(place, value) for place, value in rows)
    check_not_empty(dataset, len(conversations))
    return Source(dataset, conversations, digest, shape)


def check_digest(dataset: Dataset, digest: str) -> None:
    """Raise DatasetDigestMismatchError unless the bytes are those that the job expects, if any."""
    if dataset.sha256 and dataset.sha256.removeprefix("sha256:") != digest:
        raise DatasetDigestMismatchError(
            dataset.name,
            f"its sha256 is {digest} and the job expects {dataset.sha256}. "
            "Restore the file or correct dataset.sha256.",
        )


def check_not_empty(dataset: Dataset, rows: int) -> None:
    """Raise DatasetEmptyError where there is no row."""
    if not rows:
        raise DatasetEmptyError(dataset.name, "the file holds no sample.")


def load_feedback(dataset: Dataset, shape: Shape) -> tuple[Iterator[tuple[str, object]], str]:
    """Read a feedback log's rows; the digest is of those, as the log itself goes on growing."""
    assert dataset.feedback is not None
    rows = read_feedback(dataset.name, dataset.feedback, until=dataset.until, shape=shape)
    digest = hashlib.sha256(json.dumps([row for _, row in rows], sort_keys=True).encode())
    return iter(rows), digest.hexdigest()


@contextmanager
def open_dataset(dataset: Dataset, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a dataset's bytes as a file; one behind a URL is first kept in `scratch`, or in memory.

    Raises:
        DatasetError: there is no such file, or it cannot be read.
        DatasetUnreachableError: the server did not answer in several attempts.
    """
    if dataset.path is None:
        with io.BytesIO() if scratch is None else scratch.open("w+b") as file:
            _fetch(dataset, file)
            file.seek(0)
            yield file
        return
    try:
        with dataset.path.open("rb") as file:
            yield file
    except OSError as error:
        raise DatasetNotFoundError(
            dataset.name,
            f"{dataset.path} cannot be read ({error.strerror}). "
            "Check dataset.uri and that the volume or ConfigMap holds this file.",
        ) from error


def _fetch(dataset: Dataset, into: BinaryIO) -> None:
    """Download over HTTP(S), trying again while the fault may pass."""
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(str(dataset.url), timeout=FETCH_TIMEOUT_S) as answer:
                into.seek(0)
                into.truncate()
                shutil.copyfileobj(answer, into)
                if not answer.length:  # of what is missing; read in pieces, nobody else says so
                    return
            fault = "ends before all of the file has come"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DatasetNotFoundError(
                    dataset.name, f"{dataset.url} answers {error.code} ({error.reason})."
                ) from error
            fault = f"answers {error.code}"
        except OSError as error:
            if error.errno in FULL:
                raise  # of where it is kept, not of the server
            fault = f"cannot be reached ({getattr(error, 'reason', error)})"
    raise DatasetUnreachableError(
        dataset.name, f"{dataset.url} {fault}, also after {FETCH_ATTEMPTS} attempts."
    )


def _parse(name: str, raw: bytes) -> Iterator[tuple[str, object]]:
    """Yield each sample with its place in the file, as people count: `line 7`."""
    return parse_array(name, raw) if is_array(io.BytesIO(raw)) else parse_lines(name, raw)


def is_array(file: BinaryIO) -> bool:
    """Whether a file that stands at its beginning is one JSON array; leaves it standing there."""
    text = b""
    while not text and (piece := file.read(_HEAD_BYTES)):
        text = piece.lstrip()
    file.seek(0)
    return text.startswith(b"[")


def parse_lines(name: str, raw: bytes, *, first: int = 1) -> Iterator[tuple[str, object]]:
    """Yield the samples of whole lines, of which the first has this number in its file.

    Raises:
        DatasetNotJsonError: a line is not JSON.
    """
    if first == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(raw.split(b"\n"), start=first):
        if line.strip():
            yield f"line {number}", _parse_line(name, number, line)


def parse_array(name: str, raw: bytes) -> Iterator[tuple[str, object]]:
    """Yield the samples of a JSON array.

    Raises:
        DatasetNotJsonError: it is not JSON.
    """
    try:
        values = json.loads(raw)
    except json.JSONDecodeError as error:
        raise DatasetNotJsonError(
            name, f"line {error.lineno} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetNotJsonError(name, "the file is not UTF-8.") from error
    for number, value in enumerate(values, start=1):
        yield f"item {number}", value


def _parse_line(name: str, number: int, line: bytes) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetNotJsonError(
            name, f"line {number} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetNotJsonError(name, f"line {number} is not UTF-8.") from error
