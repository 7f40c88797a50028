"""A dataset's bytes, from a file or over HTTP, become conversations. Knows nothing of tokens.

Read as JSON lines or as one JSON array; what an object means is `records`' affair.
"""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mizzen.runtime.train.config import Dataset
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
        return _load_feedback(dataset, reader, shape)
    raw = _read_file(dataset) if dataset.path else _fetch(dataset)
    digest = hashlib.sha256(raw).hexdigest()
    if dataset.sha256 and dataset.sha256.removeprefix("sha256:") != digest:
        raise DatasetDigestMismatchError(
            dataset.name,
            f"its sha256 is {digest} and the job expects {dataset.sha256}. "
            "Restore the file or correct dataset.sha256.",
        )
    conversations = tuple(reader.read(place, value) for place, value in _parse(dataset.name, raw))
    if not conversations:
        raise DatasetEmptyError(dataset.name, "the file holds no sample.")
    return Source(dataset, conversations, digest, shape)


def _load_feedback(dataset: Dataset, reader: RecordReader, shape: Shape) -> Source:
    """Read a feedback log; its digest is of the rows, as the log itself goes on growing."""
    assert dataset.feedback is not None
    rows = read_feedback(dataset.name, dataset.feedback, until=dataset.until, shape=shape)
    digest = hashlib.sha256(json.dumps([row for _, row in rows], sort_keys=True).encode())
    conversations = tuple(reader.read(place, row) for place, row in rows)
    return Source(dataset, conversations, digest.hexdigest(), shape)


def _read_file(dataset: Dataset) -> bytes:
    path = Path(str(dataset.path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetNotFoundError(
            dataset.name,
            f"{path} cannot be read ({error.strerror}). "
            "Check dataset.uri and that the volume or ConfigMap holds this file.",
        ) from error


def _fetch(dataset: Dataset) -> bytes:
    """Download over HTTP(S), trying again while the fault may pass."""
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(str(dataset.url), timeout=FETCH_TIMEOUT_S) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DatasetNotFoundError(
                    dataset.name, f"{dataset.url} answers {error.code} ({error.reason})."
                ) from error
            fault = f"answers {error.code}"
        except OSError as error:
            fault = f"cannot be reached ({getattr(error, 'reason', error)})"
    raise DatasetUnreachableError(
        dataset.name, f"{dataset.url} {fault}, also after {FETCH_ATTEMPTS} attempts."
    )


def _parse(name: str, raw: bytes) -> Iterator[tuple[str, object]]:
    """Yield each sample with its place in the file, as people count: `line 7`."""
    if raw.lstrip().startswith(b"["):
        yield from _parse_array(name, raw)
        return
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield f"line {number}", _parse_line(name, number, line)


def _parse_array(name: str, raw: bytes) -> Iterator[tuple[str, object]]:
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
