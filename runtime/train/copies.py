"""Work that copies of the model share out: each does a part, and all of them have the whole.

They stand at the same step, and what comes of the work decides what all of them learn next. So one
that is asked to stop says so in place of its part, and all of them stop here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from safetensors.numpy import load, save

from mizzen.runtime.train.stop import Stop, YieldRequested
from mizzen.runtime.train.together import Together, wait_together
from mizzen.runtime.train.workers import Workers

T = TypeVar("T")
Row = Mapping[str, npt.NDArray[Any]]  # what came of one item, by names


def share_out(
    items: Sequence[T],
    work: Callable[[Sequence[T], int], Sequence[Row]],
    *,
    workers: Workers,
    device: torch.device,
) -> list[Row]:
    """Return a row for each item; `work` makes those of a share, given its first item's number.

    Raises:
        YieldRequested: a copy was asked to stop.
        RankLostError: another worker is gone.
    """
    if workers.copies == 1:
        return list(work(items, 0))
    own = workers.share(len(items))
    try:
        said = pack_rows(work(items[own.start : own.stop], own.start))
    except YieldRequested:
        said = b""
    parts = Together(workers.data, device).gather(said)
    if not all(parts):
        raise YieldRequested
    return [row for part in parts for row in unpack_rows(part)]


def ask_out(
    items: Sequence[T],
    ask: Callable[[Sequence[T], Stop], Sequence[Row]],
    *,
    workers: Workers,
    device: torch.device,
    stop: Stop,
) -> list[Row]:
    """Return a row for each item; one worker of each copy asks others about its copy's share.

    All workers wait together, so none runs out of time while another's answers take long.

    Raises:
        YieldRequested: a worker was asked to stop; all of them raise it.
        RankLostError: another worker is gone, perhaps since it got no answer.
    """
    copy, copies = Together(workers.tensor, device), Together(workers.data, device)
    own = workers.share(len(items))

    def work(looks: Stop) -> bytes:
        return pack_rows(ask(items[own.start : own.stop], looks))

    found = wait_together([copy, copies], work if copy.is_leader else None, stop)
    parts = copies.gather(copy.say(found or b""))
    return [row for part in parts for row in unpack_rows(part)]


def pack_rows(rows: Sequence[Row]) -> bytes:
    """Return rows as bytes, never none at all."""
    named = {f"{place}.{name}": x for place, row in enumerate(rows) for name, x in row.items()}
    return save(named)


def unpack_rows(said: bytes) -> list[Row]:
    """Return the rows of these bytes."""
    rows: dict[int, dict[str, npt.NDArray[Any]]] = {}
    for key, array in load(said).items():
        place, name = key.split(".")
        rows.setdefault(int(place), {})[name] = array
    return [rows[place] for place in range(len(rows))]
