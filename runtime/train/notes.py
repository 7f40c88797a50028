"""What a frozen model says about each item: asked once before training, and kept on disk.

A base that is only asked need not be kept beside the model that changes, and a teacher need not
stay in memory at all. Answers are kept in parts, so that a job that is stopped while it asks goes
on with the first item that has no answer yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mizzen.runtime.train.data import Prepared
from mizzen.runtime.train.durable import storage_faults_of, write_durably
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.method import NotedMethod
from mizzen.runtime.train.samples import Item

log = logging.getLogger(__name__)

_PART_ITEMS = 64

# Answers some items; `first` is the number of the first one among all.
Ask = Callable[[Sequence[Item], int], list[Tensor]]


class NoteStore:
    """The answers of one job, in one folder."""

    def __init__(self, directory: Path, *, fingerprint: str) -> None:
        self._directory = directory / "notes"
        self._fingerprint = fingerprint

    def load(self) -> list[Tensor]:
        """Return the answers that are there, from the first item on without a gap."""
        answers: list[Tensor] = []
        while (part := self._read(len(answers))) is not None:
            answers.extend(part)
        return answers

    def add(self, first: int, answers: Sequence[Tensor]) -> None:
        """Keep the answers of the items from `first` on."""
        tensors = {f"{index:04d}": answer.contiguous() for index, answer in enumerate(answers)}
        with storage_faults_of("A note of a frozen model", self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            metadata = {"fingerprint": self._fingerprint}
            write_durably(self._path(first), save(tensors, metadata=metadata))

    def _read(self, first: int) -> list[Tensor] | None:
        path = self._path(first)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self._fingerprint:
                    return None
                return [file.get_tensor(name) for name in sorted(file.keys())]
        except SafetensorError:
            return None  # damaged: asking again is always possible

    def _path(self, first: int) -> Path:
        return self._directory / f"part-{first:08d}.safetensors"


class Notes(Protocol):
    """Where answers are kept."""

    def load(self) -> list[Tensor]:
        """Return the answers that are there, from the first item on without a gap."""
        ...

    def add(self, first: int, answers: Sequence[Tensor]) -> None:
        """Keep the answers of the items from `first` on."""
        ...


def take_notes(
    data: Prepared,
    method: NotedMethod,
    store: Notes,
    *,
    ask: Callable[[], Ask],
    at_once: AtOnce,
    ranks: int = 1,
) -> Prepared:
    """Return the data with a frozen model's answers attached to each item.

    `ask` is called only if answers are missing: it may load a model.
    """
    items = [item for items in (*data.train, data.holdout) for item in items]
    answers = store.load()
    if len(answers) < len(items):
        log.info("Asking a frozen model about %d items.", len(items) - len(answers))
        asked = ask()

        def answer(part: Sequence[Item], first: int) -> list[Tensor]:
            return at_once.in_parts(part, lambda some, at: asked(some, first + at), ranks=ranks)

        _answer(items, answers, store, answer)
    noted = (method.note(item, answer) for item, answer in zip(items, answers, strict=True))
    return replace(
        data,
        train=tuple(tuple(_next(noted, len(part))) for part in data.train),
        holdout=tuple(_next(noted, len(data.holdout))),
    )


@torch.no_grad()
def _answer(items: Sequence[Item], answers: list[Tensor], store: Notes, ask: Ask) -> None:
    while (first := len(answers)) < len(items):
        part = ask(items[first : first + _PART_ITEMS], first)
        store.add(first, part)
        answers += part


def _next(noted: Iterator[Item], count: int) -> list[Item]:
    return [next(noted) for _ in range(count)]
