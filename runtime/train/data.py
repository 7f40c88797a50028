"""Everything a job learns from, and the part of it that is frozen as the holdout."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.decontaminate import find_contaminated
from mizzen.runtime.train.errors import DatasetEmptyError
from mizzen.runtime.train.records import Conversation
from mizzen.runtime.train.render import ChatRenderer, SampleRenderer, Tally
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.sources import Source

# A gate needs enough samples to be steady, not a tenth of a huge dataset.
HOLDOUT_MAX_SAMPLES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All data of a job. `train` and `weights` run in step: one entry for each dataset."""

    train: tuple[Sequence[Item], ...]  # in memory, or read from a file item by item
    weights: tuple[float, ...]
    holdout: tuple[Item, ...]
    held_out: tuple[Conversation, ...] = ()  # the same samples, as they were read
    truncated: int
    dropped: int
    contaminated: int = 0  # left out of the holdout: training samples nearly contain them
    digest: str  # of all bytes read: a resumed job must see the same

    @property
    def samples(self) -> int:
        """Number of samples trained on."""
        return sum(map(len, self.train))

    @property
    def counts(self) -> dict[str, int]:
        """What became of the samples, for reports."""
        return {
            "samples": self.samples,
            "holdout": len(self.holdout),
            "truncated": self.truncated,
            "dropped": self.dropped,
            "contaminated": self.contaminated,
        }


def prepare(sources: Sequence[Source], renderer: ChatRenderer, rules: Processing) -> Prepared:
    """Render, label, shorten and split everything the job trains on.

    Raises:
        DatasetError: nothing would be learned, or never how to stop.
    """
    held_keys = choose_holdout(_keys(sources), rules.holdout_ratio)
    train: list[tuple[Item, ...]] = []
    conversations = {c.key: c for source in sources for c in source.conversations}
    held_out = [conversations[key] for key in sorted(held_keys)]
    trained = [c for key, c in conversations.items() if key not in held_keys]
    contaminated = find_contaminated(held_out, trained)
    holdout: dict[bytes, Item] = {}
    total = Tally()
    for source in sources:
        items, tally = _render(source, renderer, rules)
        total += tally
        train.append(tuple(item for key, item in items if key not in held_keys))
        holdout.update((key, item) for key, item in items if key in held_keys - contaminated)
        check_trained(source.dataset, len(train[-1]))
    return Prepared(
        train=tuple(train),
        weights=tuple(source.dataset.weight for source in sources),
        holdout=tuple(holdout[key] for key in sorted(holdout)),
        held_out=tuple(conversations[key] for key in sorted(holdout)),
        truncated=total.truncated,
        dropped=total.dropped,
        contaminated=len(contaminated),
        digest=join_digests(source.digest for source in sources),
    )


def _keys(sources: Sequence[Source]) -> Iterator[bytes]:
    return (c.key for source in sources for c in source.conversations)


def _render(
    source: Source, renderer: ChatRenderer, rules: Processing
) -> tuple[list[tuple[bytes, Item]], Tally]:
    """Return the items worth learning from, with the keys they are split by."""
    rendering = SampleRenderer(renderer, rules, dataset=source.dataset.name, shape=source.shape)
    tally, items = Tally(), list[tuple[bytes, Item]]()
    for conversation in source.conversations:
        rendered = rendering.render(conversation)
        tally.add(rendered)
        if rendered.item is not None:
            items.append((rendered.key, rendered.item))
    tally.check(source.dataset.name, rules.max_seq_len)
    return items, tally


def check_trained(dataset: Dataset, items: int) -> None:
    """Raise DatasetEmptyError where all that is worth learning from is held out."""
    if not items:
        raise DatasetEmptyError(dataset.name, "the holdout leaves no sample to train.")


def join_digests(digests: Iterable[str]) -> str:
    """Return one digest of all bytes read, from those of the datasets in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def choose_holdout(keys: Iterable[bytes], ratio: float) -> frozenset[bytes]:
    """Return the keys of the samples kept out of training, as a set of all keys says.

    A sample is held out by its own content, so a copy of it in another dataset is held out too
    and a dataset that grows keeps its old holdout. Keys beyond the `HOLDOUT_MAX_SAMPLES` lowest
    make no difference, so that nobody need have all of them.
    """
    if not ratio:
        return frozenset()
    lowest = heapq.nsmallest(HOLDOUT_MAX_SAMPLES, set(keys))
    limit = int(ratio * 2**64)
    below = [key for key in lowest if int.from_bytes(key[:8], "big") < limit]
    # A handful of samples may all hash above the limit; the gate still needs one to ask.
    return frozenset(below or lowest[:1])
