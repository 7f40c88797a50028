"""Conversations become labelled tokens, and a part of them is frozen as the holdout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mizzen.runtime.errors import MizzenError
from mizzen.runtime.train.config import Dataset, Processing
from mizzen.runtime.train.errors import (
    DatasetEmptyError,
    DatasetNeverStopsError,
    DatasetNoAssistantTurnsError,
    DatasetRefusedByTemplateError,
)
from mizzen.runtime.train.sources import Conversation, Source

# A gate needs enough samples to be steady, not a tenth of a huge dataset.
HOLDOUT_MAX_SAMPLES = 512


class ChatRenderer(Protocol):
    """The part of the serving tokenizer that training needs: one template for both."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end a turn."""
        ...

    def render_for_training(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], list[bool]]:
        """Return token ids and, for each, whether the assistant wrote it (its end included)."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All data of a job. `train` and `weights` run in step: one entry for each dataset."""

    train: tuple[tuple[Sample, ...], ...]
    weights: tuple[float, ...]
    holdout: tuple[Sample, ...]
    truncated: int
    dropped: int
    digest: str  # of all bytes read: a resumed job must see the same

    @property
    def samples(self) -> int:
        """Number of samples trained on."""
        return sum(map(len, self.train))


@dataclass(slots=True)
class _Cuts:
    truncated: int = 0
    dropped: int = 0


def prepare(sources: Sequence[Source], renderer: ChatRenderer, rules: Processing) -> Prepared:
    """Render, label, shorten and split everything the job trains on.

    Raises:
        DatasetError: nothing would be learned, or never how to stop.
    """
    cuts = _Cuts()
    held_keys = choose_holdout(sources, rules.holdout_ratio)
    train: list[tuple[Sample, ...]] = []
    holdout: dict[bytes, Sample] = {}
    for source in sources:
        samples = _render_source(source, renderer, rules, cuts)
        train.append(tuple(s for key, s in samples if key not in held_keys))
        holdout.update((key, s) for key, s in samples if key in held_keys)
        if not train[-1]:
            raise DatasetEmptyError(source.dataset.name, "the holdout leaves no sample to train.")
    digest = hashlib.sha256("".join(source.digest for source in sources).encode())
    return Prepared(
        train=tuple(train),
        weights=tuple(source.dataset.weight for source in sources),
        holdout=tuple(holdout[key] for key in sorted(holdout)),
        truncated=cuts.truncated,
        dropped=cuts.dropped,
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


def _render_source(
    source: Source, renderer: ChatRenderer, rules: Processing, cuts: _Cuts
) -> list[tuple[bytes, Sample]]:
    """Return the samples worth training on, with the keys they are split by."""
    name = source.dataset.name
    rendered = [(c.key, _render(name, c, renderer, rules)) for c in source.conversations]
    if not any(sample.labels for _, sample in rendered):
        raise DatasetNoAssistantTurnsError(
            name,
            f"none of its {len(rendered)} samples has an assistant turn to learn from.",
        )
    shortened = [(key, _shorten(sample, rules, cuts)) for key, sample in rendered]
    kept = [(key, sample) for key, sample in shortened if sample is not None]
    if not kept:
        raise DatasetEmptyError(
            name,
            f"all {len(rendered)} samples are longer than {rules.max_seq_len} tokens. "
            "Raise processing.maxSeqLen.",
        )
    _check_stops(source.dataset, [sample for _, sample in kept], renderer.eos_token_ids)
    return kept


def _render(
    name: str, conversation: Conversation, renderer: ChatRenderer, rules: Processing
) -> Sample:
    try:
        token_ids, is_assistant = renderer.render_for_training(conversation.messages)
    except MizzenError as error:
        raise DatasetRefusedByTemplateError(name, f"{conversation.place}: {error}") from error
    is_label_T = np.asarray(is_assistant, dtype=np.bool_)
    if rules.loss_on == "all":
        is_label_T = np.ones_like(is_label_T)
    # Nothing comes before the first token, so nobody can be asked to predict it.
    is_label_T[:1] = False
    return Sample(np.asarray(token_ids, dtype=np.int32), is_label_T)


def _shorten(sample: Sample, rules: Processing, cuts: _Cuts) -> Sample | None:
    """Return what fits of a sample; None when that would teach nothing."""
    fits = sample
    if len(sample) > rules.max_seq_len:
        if rules.on_overlong == "drop":
            cuts.dropped += 1
            return None
        limit = rules.max_seq_len
        fits = Sample(sample.token_ids_T[:limit], sample.is_label_T[:limit])
    if not fits.labels:
        cuts.dropped += 1
        return None
    cuts.truncated += fits is not sample
    return fits


def _check_stops(dataset: Dataset, samples: Sequence[Sample], ends: Sequence[int]) -> None:
    """Refuse data from which a model would unlearn to end its turn."""
    end_ids = np.asarray(ends, dtype=np.int32)
    if not any(np.isin(s.token_ids_T[s.is_label_T], end_ids).any() for s in samples):
        raise DatasetNeverStopsError(
            dataset.name,
            "no label token ends a turn, so the model would never stop talking. "
            "Raise processing.maxSeqLen or use a chat template that ends assistant turns.",
        )
