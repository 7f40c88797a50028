"""Bytes of a dataset become conversations. Knows nothing of tokens.

Two forms are read, told apart sample by sample: `{"messages": [{"role", "content"}, ...]}` and
`{"prompt": "...", "completion": "..."}`; as JSON lines or as one JSON array.
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
from typing import Any

from mizzen.runtime.train.config import Dataset
from mizzen.runtime.train.errors import (
    DatasetDigestMismatchError,
    DatasetEmptyError,
    DatasetFormatUnknownError,
    DatasetNotFoundError,
    DatasetNotJsonError,
    DatasetUnreachableError,
)

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
FETCH_ATTEMPTS = 4
FETCH_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample; `key` is the hash of its content and decides whether it is held out."""

    messages: tuple[Message, ...]
    key: bytes
    place: str  # in its file, as people count


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset as read: its conversations and the digest of its bytes."""

    dataset: Dataset
    conversations: tuple[Conversation, ...]
    digest: str


def load_source(dataset: Dataset, *, default_format: str) -> Source:
    """Read a dataset from its file or URL.

    Raises:
        DatasetError: the bytes are missing, are not those announced, or are no conversations.
        DatasetUnreachableError: the server did not answer in several attempts.
    """
    raw = _read_file(dataset) if dataset.path else _fetch(dataset)
    digest = hashlib.sha256(raw).hexdigest()
    if dataset.sha256 and dataset.sha256.removeprefix("sha256:") != digest:
        raise DatasetDigestMismatchError(
            dataset.name,
            f"its sha256 is {digest} and the job expects {dataset.sha256}. "
            "Restore the file or correct dataset.sha256.",
        )
    form = dataset.format or default_format
    conversations = tuple(
        _conversation(dataset.name, place, value, form)
        for place, value in _parse(dataset.name, raw)
    )
    if not conversations:
        raise DatasetEmptyError(dataset.name, "the file holds no sample.")
    return Source(dataset, conversations, digest)


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


def _conversation(name: str, place: str, value: object, form: str) -> Conversation:
    if not isinstance(value, dict):
        raise DatasetFormatUnknownError(name, f"{place} is not a JSON object.")
    if form != "promptCompletion" and "messages" in value:
        messages = _checked_messages(name, place, value["messages"])
    elif form != "messages" and {"prompt", "completion"} <= value.keys():
        messages = _prompt_and_completion(name, place, value)
    else:
        wanted = {
            "auto": 'neither "messages" nor "prompt" and "completion"',
            "messages": 'no "messages"',
            "promptCompletion": 'no "prompt" and "completion"',
        }[form]
        raise DatasetFormatUnknownError(
            name, f"{place} has {wanted}; its keys are {', '.join(map(str, value)) or 'none'}."
        )
    canonical = json.dumps(messages, sort_keys=True, ensure_ascii=False)
    return Conversation(messages, hashlib.sha256(canonical.encode()).digest(), place)


def _checked_messages(name: str, place: str, messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise DatasetFormatUnknownError(name, f'{place}: "messages" must be a non-empty list.')
    for index, message in enumerate(messages):
        where = f"{place}: messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DatasetFormatUnknownError(
                name, f"{where} needs a role out of {', '.join(ROLES)}."
            )
        if not isinstance(message.get("content"), str):
            raise DatasetFormatUnknownError(name, f"{where} needs its content as a string.")
    return tuple(messages)


def _prompt_and_completion(name: str, place: str, value: dict[str, object]) -> tuple[Message, ...]:
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DatasetFormatUnknownError(name, f"{place}: prompt and completion must be strings.")
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
