"""A held-out sample that the training data nearly contains says nothing about what was learned.

Measured by the words two texts have in a row, as GPT-3's evaluation was cleaned (Brown et al.,
2020, appendix C). Copies, word for word, are held out together already; this finds near copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from mizzen.runtime.train.records import Conversation

WORDS_IN_A_ROW = 13
# Words that so many training samples share are the task's wording and no sample's own.
_COMMON_SAMPLES = 10
_COMMON_RATIO = 0.2

# From so many training samples on, further ones make no difference to what is common.
ENOUGH_TRAINED = math.ceil(_COMMON_SAMPLES / _COMMON_RATIO)

_WORD = re.compile(r"\w+")
Run = tuple[str, ...]


class Sightings:
    """Which training samples have which runs; a copy of a sample counts once."""

    def __init__(self) -> None:
        self.samples_with: dict[int, set[bytes]] = {}

    def note(self, key: bytes, runs: Iterable[int]) -> None:
        """Remember what a training sample has."""
        for run in runs:
            samples = self.samples_with.setdefault(run, set())
            if len(samples) <= _COMMON_SAMPLES:  # beyond it is common, whoever else has it
                samples.add(key)

    def add(self, other: Sightings) -> None:
        """Remember what was seen in another part of the data."""
        for run, keys in other.samples_with.items():
            for key in keys:
                self.note(key, [run])


class HeldRuns:
    """The words that held-out samples have in a row; each such run has a number."""

    def __init__(self, held_out: Iterable[Conversation]) -> None:
        runs_of = {conversation.key: _runs(conversation) for conversation in held_out}
        looked_for = frozenset[Run]().union(*runs_of.values())
        self._numbers = {run: number for number, run in enumerate(looked_for)}
        self._runs_of = {
            key: frozenset(self._numbers[run] for run in runs) for key, runs in runs_of.items()
        }

    def shared(self, conversation: Conversation) -> frozenset[int]:
        """Return which of them a training sample has."""
        if not self._numbers:
            return frozenset()
        own = _runs(conversation)
        return frozenset(self._numbers[run] for run in own if run in self._numbers)

    def contaminated(self, sightings: Sightings, *, trained: int) -> frozenset[bytes]:
        """Return the keys of the held-out samples that share a run which is not common.

        Args:
            sightings: What all training samples share.
            trained: How many those are; above `ENOUGH_TRAINED` any number says the same.
        """
        most = min(_COMMON_SAMPLES, max(1, int(_COMMON_RATIO * trained)))
        seen = sightings.samples_with.items()
        found = {run for run, samples in seen if len(samples) <= most}
        return frozenset(key for key, runs in self._runs_of.items() if runs & found)


def find_contaminated(
    held_out: Iterable[Conversation], trained: Sequence[Conversation]
) -> frozenset[bytes]:
    """Return the keys of the held-out samples that share words in a row with a training sample."""
    held_runs, sightings = HeldRuns(held_out), Sightings()
    for conversation in trained:
        sightings.note(conversation.key, held_runs.shared(conversation))
    return held_runs.contaminated(sightings, trained=len({c.key for c in trained}))


def _runs(conversation: Conversation) -> frozenset[Run]:
    """Return all runs of words, or all words where they are fewer than one run."""
    texts = (m["content"] for m in conversation.messages if m["role"] != "system")
    words = _WORD.findall(" ".join(texts).lower())
    count = max(1, len(words) - WORDS_IN_A_ROW + 1)
    return frozenset(tuple(words[i : i + WORDS_IN_A_ROW]) for i in range(count))
