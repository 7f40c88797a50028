"""Everything a job learns from, and the part of it that is frozen as the holdout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from mizzen.runtime.train.config import Processing
from mizzen.runtime.train.decontaminate import find_contaminated
from mizzen.runtime.train.errors import DatasetEmptyError
from mizzen.runtime.train.records import Conversation
from mizzen.runtime.train.render import ChatRenderer, SourceRenderer
from mizzen.runtime.train.samples import Item
from mizzen.runtime.train.sources import Source

# A gate needs enough samples to be steady, not a tenth of a huge dataset.
HOLDOUT_MAX_SAMPLES = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All data of a job. `train` and `weights` run in step: one entry for each dataset."""

    train: tuple[tuple[Item, ...], ...]
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
    rendering = SourceRenderer(renderer, rules)
    held_keys = choose_holdout(sources, rules.holdout_ratio)
    train: list[tuple[Item, ...]] = []
    conversations = {c.key: c for source in sources for c in source.conversations}
    held_out = [conversations[key] for key in sorted(held_keys)]
    trained = [c for key, c in conversations.items() if key not in held_keys]
    contaminated = find_contaminated(held_out, trained)
    holdout: dict[bytes, Item] = {}
    for source in sources:
        items = rendering.render(source)
        train.append(tuple(item for key, item in items if key not in held_keys))
        holdout.update((key, item) for key, item in items if key in held_keys - contaminated)
        if not train[-1]:
            raise DatasetEmptyError(source.dataset.name, "the holdout leaves no sample to train.")
    digest = hashlib.sha256("".join(source.digest for source in sources).encode())
    return Prepared(
        train=tuple(train),
        weights=tuple(source.dataset.weight for source in sources),
        holdout=tuple(holdout[key] for key in sorted(holdout)),
        held_out=tuple(conversations[key] for key in sorted(holdout)),
        truncated=rendering.cuts.truncated,
        dropped=rendering.cuts.dropped,
        contaminated=len(contaminated),
        digest=digest.hexdigest(),
    )


def choose_holdout(sources: Sequence[Source], ratio: float) -> frozenset[bytes]:
    """Return the keys of the samples kept out of training.

    A sample is held out by its own content, so a copy of it in another dataset is held out too
    and a dataset that grows keeps its old holdout.
    """
    if not ratio:
        return frozenset()
    keys = sorted({c.key for source in sources for c in source.conversations})
    limit = int(ratio * 2**64)
    below = [key for key in keys if int.from_bytes(key[:8], "big") < limit]
    # A handful of samples may all hash above the limit; the gate still needs one to ask.
    return frozenset((below or keys[:1])[:HOLDOUT_MAX_SAMPLES])
