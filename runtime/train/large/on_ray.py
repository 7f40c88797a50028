"""Blocks on Ray Data: each goes through one of a few processes, and the outcomes come in order."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.exceptions import RayActorError
from ray.util.annotations import RayDeprecationWarning

from mizzen.runtime.train.errors import DatasetError, PreparationLostError
from mizzen.runtime.train.large.blocks import Block
from mizzen.runtime.train.large.prepare import Crew, Outcome

# Of a place's seats, so that roles have theirs.
_SEAT_SHARE = 0.001


def ray_crew(*, workers: int, place: str) -> Crew:
    """Return who works in so many processes of the pod that has this place."""
    return partial(_map_blocks, workers=workers, place=place)


class _Worker:
    """A process that does the work with block after block."""

    def __init__(self, work: Callable[[Block], Any]) -> None:
        self._work = work

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        try:
            outcome = pickle.dumps(self._work(Block(**row)))
        except DatasetError:
            outcome = None
        return pa.table({"outcome": pa.array([outcome], type=pa.large_binary())})


def _map_blocks(
    work: Callable[[Block], Outcome], blocks: Sequence[Block], /, *, workers: int, place: str
) -> Iterator[Outcome]:
    if not blocks:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    data = ray.data.from_items(list(map(asdict, blocks)), override_num_blocks=len(blocks))
    with warnings.catch_warnings():
        # There is no other way yet to say that a process which dies is not to be tried for ever.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        data = data.map_batches(
            _Worker,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(work,),
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(blocks))),
            num_cpus=0,
            resources={place: _SEAT_SHARE},
            max_restarts=0,
            max_task_retries=0,
        )
    batches = data.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
    try:
        for block, batch in zip(blocks, batches, strict=True):
            (outcome,) = batch["outcome"].to_pylist()
            # A bad row is met again here, where its error has its type and its words.
            yield work(block) if outcome is None else pickle.loads(outcome)
    except RayActorError as error:
        raise PreparationLostError from error
