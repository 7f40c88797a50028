"""A held-out sample that the training data nearly contains says nothing about what was learned.

Measured by the words two texts have in a row, as GPT-3's evaluation was cleaned (Brown et al.,
2020, appendix C). Copies, word for word, are held out together already; this finds near copies.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from mizzen.runtime.train.records import Conversation

WORDS_IN_A_ROW = 13
# Words that so many training samples share are the task's wording and no sample's own.
_COMMON_SAMPLES = 10
_COMMON_RATIO = 0.2

_WORD = re.compile(r"\w+")


def find_contaminated(
    held_out: Iterable[Conversation], trained: Sequence[Conversation]
) -> frozenset[bytes]:
    """Return the keys of the held-out samples that share words in a row with a training sample."""
    runs = {conversation.key: _runs(conversation) for conversation in held_out}
    looked_for = frozenset().union(*runs.values())
    samples_with: Counter[tuple[str, ...]] = Counter()
    for conversation in trained:
        samples_with.update(looked_for & _runs(conversation))
    most = min(_COMMON_SAMPLES, max(1, int(_COMMON_RATIO * len(trained))))
    shared = {run for run, samples in samples_with.items() if samples <= most}
    return frozenset(key for key, own in runs.items() if own & shared)


def _runs(conversation: Conversation) -> frozenset[tuple[str, ...]]:
    """Return all runs of words, or all words where they are fewer than one run."""
    texts = (m["content"] for m in conversation.messages if m["role"] != "system")
    words = _WORD.findall(" ".join(texts).lower())
    count = max(1, len(words) - WORDS_IN_A_ROW + 1)
    return frozenset(tuple(words[i : i + WORDS_IN_A_ROW]) for i in range(count))
