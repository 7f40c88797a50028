"""The large path: two passes over blocks, with the same outcome as `data.prepare`.

The first finds what is held out, the second renders. Both can go over the blocks in several
processes, which is the affair of who is given as `crew`; what comes back is taken in order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar

from mizzen.runtime.train.data import Prepared, check_trained, choose_holdout, join_digests
from mizzen.runtime.train.decontaminate import HeldRuns, Sightings
from mizzen.runtime.train.durable import storage_faults_of
from mizzen.runtime.train.large.blocks import BLOCK_BYTES, Block, Cut, cut_all
from mizzen.runtime.train.large.mapped import ItemFile, MappedItems
from mizzen.runtime.train.large.work import BlockReader, BlockRenderer, keep_lowest
from mizzen.runtime.train.records import Conversation
from mizzen.runtime.train.render import ChatRenderer, Tally
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.sources import check_not_empty

Outcome = TypeVar("Outcome")


class Crew(Protocol):
    """Does something with each block, anywhere, and yields the outcomes in the blocks' order."""

    def __call__(
        self, work: Callable[[Block], Outcome], blocks: Sequence[Block], /
    ) -> Iterator[Outcome]:
        """Yield what `work` returns of each block, or raise what it raises."""
        ...


def prepare_large(
    reader: BlockReader, renderer: ChatRenderer, crew: Crew, *, block_bytes: int = BLOCK_BYTES
) -> Prepared:
    """Read, render, label, shorten and split everything the job trains on.

    Raises:
        DatasetError: as of `load_source` and `prepare`, in the same order with the same words.
        StorageFullError: the scratch folder has no room for the tokens.
    """
    with tempfile.TemporaryDirectory(prefix="data-") as folder:
        scratch = Path(folder)
        with storage_faults_of("The prepared data", scratch):
            cuts, fault = cut_all(reader.datasets, reader.shape, scratch, block_bytes=block_bytes)
            lowest = _find_lowest(cuts, reader, crew)
            if fault is not None:
                raise fault
            # The files' names go with the folder, and the tokens when nobody has them mapped.
            return _render(cuts, lowest, reader, renderer, crew, scratch)


def _find_lowest(cuts: Sequence[Cut], reader: BlockReader, crew: Crew) -> dict[bytes, Conversation]:
    lowest: dict[bytes, Conversation] = {}
    found_in_blocks = crew(reader.lowest, [block for cut in cuts for block in cut.blocks])
    for cut in cuts:
        samples = 0
        for found in islice(found_in_blocks, len(cut.blocks)):
            samples += len(found)
            lowest = keep_lowest(lowest | found)
        check_not_empty(cut.dataset, samples)
    return lowest


def _render(
    cuts: Sequence[Cut],
    lowest: dict[bytes, Conversation],
    reader: BlockReader,
    renderer: ChatRenderer,
    crew: Crew,
    scratch: Path,
) -> Prepared:
    held_keys = choose_holdout(lowest, reader.rules.holdout_ratio)
    held_runs = HeldRuns(lowest[key] for key in sorted(held_keys))
    work = BlockRenderer(reader=reader, renderer=renderer, held_keys=held_keys, held_runs=held_runs)
    parts = crew(work.render, [block for cut in cuts for block in cut.blocks])
    total, sightings = Tally(), Sightings()
    held: dict[bytes, Item] = {}
    train: list[MappedItems] = []
    for number, cut in enumerate(cuts):
        tally, path = Tally(), scratch / f"items-{number}.arrow"
        with ItemFile(path) as file:
            for part in islice(parts, len(cut.blocks)):
                file.append(part.encoded)
                held.update(part.held)
                tally += part.tally
                sightings.add(part.sightings)
        tally.check(cut.dataset.name, reader.rules.max_seq_len)
        train.append(MappedItems(path))
        check_trained(cut.dataset, len(train[-1]))
        total += tally
    contaminated = held_runs.contaminated(sightings, trained=len(lowest) - len(held_keys))
    kept = sorted(held.keys() - contaminated)
    return Prepared(
        train=tuple(train),
        weights=tuple(cut.dataset.weight for cut in cuts),
        holdout=tuple(held[key] for key in kept),
        held_out=tuple(lowest[key] for key in kept),
        truncated=total.truncated,
        dropped=total.dropped,
        contaminated=len(contaminated),
        digest=join_digests(cut.digest for cut in cuts),
    )
