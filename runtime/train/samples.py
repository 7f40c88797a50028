"""What a step takes in: rendered and labelled, of one shape for each kind of method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Item(Protocol):
    """One unit of a step."""

    def __len__(self) -> int:
        """Return how many tokens it has."""
        ...

    @property
    def labels(self) -> int:
        """How much it counts in a step's mean."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """Tokens of one conversation; `is_label_T` marks those whose prediction is scored."""

    token_ids_T: npt.NDArray[np.int32]
    is_label_T: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids_T)

    @property
    def labels(self) -> int:
        """Number of scored tokens."""
        return int(self.is_label_T.sum())


@dataclass(frozen=True, slots=True)
class TaughtSample:
    """A sample with the ids that a teacher drew where each label is to be predicted."""

    sample: Sample
    drawn_NK: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def labels(self) -> int:
        """Number of scored tokens."""
        return self.sample.labels


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference: two conversations of which people like the first one better."""

    chosen: Sample
    rejected: Sample
    reference_margin: float = 0.0  # how much likelier the base finds the first, in nats

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def labels(self) -> int:
        """One: a step's mean goes over pairs, not over their tokens."""
        return 1


@dataclass(frozen=True, slots=True)
class Rating:
    """A conversation by itself, whose answer people liked or did not."""

    sample: Sample
    is_liked: bool

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def labels(self) -> int:
        """One, as a preference."""
        return 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model shall continue; `answer` is what a rule may compare with."""

    token_ids_T: npt.NDArray[np.int32]
    answer: str | None = None

    def __len__(self) -> int:
        return len(self.token_ids_T)

    @property
    def labels(self) -> int:
        """One: a step's mean goes over prompts."""
        return 1


def prompt_of(sample: Sample) -> Prompt:
    """Return what comes before the sample's first label."""
    start = int(np.argmax(sample.is_label_T))
    return Prompt(sample.token_ids_T[:start])


def joined(prompt: Prompt, answer: Sequence[int]) -> Sample:
    """Return a prompt with an answer, whose tokens are the labels."""
    token_ids_T = np.concatenate([prompt.token_ids_T, np.asarray(answer, np.int32)])
    return Sample(token_ids_T, np.arange(len(token_ids_T)) >= len(prompt))
