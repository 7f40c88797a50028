"""What is done with one block, in whichever process. The rules are the small path's."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.data import HOLDOUT_MAX_SAMPLES
from mizzen.runtime.train.decontaminate import ENOUGH_TRAINED, HeldRuns, Sightings
from mizzen.runtime.train.large.blocks import Block
from mizzen.runtime.train.large.mapped import encode
from mizzen.runtime.train.records import Conversation, RecordReader, Shape
from mizzen.runtime.train.render import ChatRenderer, SampleRenderer, Tally
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.sources import parse_lines

# Beyond these, samples decide neither the holdout nor what is common among the others.
LOWEST_KEYS = HOLDOUT_MAX_SAMPLES + ENOUGH_TRAINED


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReader:
    """Reads the blocks of a job's datasets.

    Every method raises DatasetError for the first row that cannot be read.
    """

    datasets: tuple[Dataset, ...]
    rules: Processing
    shape: Shape

    def lowest(self, block: Block) -> dict[bytes, Conversation]:
        """Return the samples with the lowest keys of a block; of copies, the last one."""
        return keep_lowest({one.key: one for one in self.conversations(block)})

    def conversations(self, block: Block) -> Iterator[Conversation]:
        """Yield a block's samples."""
        dataset = self.datasets[block.dataset]
        form = dataset.format or self.rules.format
        reader = RecordReader(dataset.name, shape=self.shape, form=form)
        for place, value in _rows(block, dataset.name):
            yield reader.read(place, value)


def keep_lowest(samples: dict[bytes, Conversation]) -> dict[bytes, Conversation]:
    """Return those with the lowest keys."""
    return {key: samples[key] for key in heapq.nsmallest(LOWEST_KEYS, samples)}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockItems:
    """What is learned from a block, as `mapped.encode` writes it, and what is known of the rest."""

    encoded: bytes
    held: list[tuple[bytes, Item]]
    tally: Tally = field(default_factory=Tally)
    sightings: Sightings = field(default_factory=Sightings)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRenderer:
    """Renders the blocks of a job's datasets, once it is known what is held out."""

    reader: BlockReader
    renderer: ChatRenderer
    held_keys: frozenset[bytes]
    held_runs: HeldRuns

    def render(self, block: Block) -> BlockItems:
        """Return what is learned from a block.

        Raises:
            DatasetError: the model's template cannot render a sample.
        """
        reader, train = self.reader, list[Item]()
        dataset = reader.datasets[block.dataset].name
        rendering = SampleRenderer(self.renderer, reader.rules, dataset=dataset, shape=reader.shape)
        held, tally, sightings = list[tuple[bytes, Item]](), Tally(), Sightings()
        for conversation in reader.conversations(block):
            rendered = rendering.render(conversation)
            tally.add(rendered)
            is_held = rendered.key in self.held_keys
            if not is_held:
                sightings.note(rendered.key, self.held_runs.shared(conversation))
            if rendered.item is not None and is_held:
                held.append((rendered.key, rendered.item))
            elif rendered.item is not None:
                train.append(rendered.item)
        return BlockItems(encoded=encode(train), held=held, tally=tally, sightings=sightings)


def _rows(block: Block, dataset: str) -> Iterator[tuple[str, object]]:
    with Path(block.path).open("rb") as file:
        file.seek(block.start)
        raw = file.read(block.size)
    if block.is_placed:
        for line in raw.splitlines():
            place, value = json.loads(line)
            yield place, value
    else:
        yield from parse_lines(dataset, raw, first=block.first_line)
