"""Conversations become labelled tokens that fit, as the serving tokenizer's template says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mizzen.runtime.errors import MizzenError
from mizzen.runtime.train.config import Processing
from mizzen.runtime.train.errors import (
    DatasetEmptyError,
    DatasetNeverStopsError,
    DatasetNoAssistantTurnsError,
    DatasetRefusedByTemplateError,
)
from mizzen.runtime.train.records import Conversation, Messages
from mizzen.runtime.train.samples import Item, Pair, Prompt, Rating, Sample
from mizzen.runtime.train.sources import Source


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

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens that ask the model for its next turn."""
        ...


@dataclass(slots=True)
class Cuts:
    """What did not fit."""

    truncated: int = 0
    dropped: int = 0


class SourceRenderer:
    """Renders one dataset after the other by the same rules, and counts what did not fit."""

    def __init__(self, renderer: ChatRenderer, rules: Processing) -> None:
        self._renderer = renderer
        self._rules = rules
        self.cuts = Cuts()

    def render(self, source: Source) -> list[tuple[bytes, Item]]:
        """Return the items worth learning from, with the keys they are split by.

        Raises:
            DatasetError: nothing would be learned, or never how to stop.
        """
        if source.shape == "prompt":
            return self._prompts(source)
        rendered = [(c, self._versions(source, c)) for c in source.conversations]
        if not any(sample.labels for _, (sample, *_) in rendered):
            raise DatasetNoAssistantTurnsError(
                source.dataset.name,
                f"none of its {len(rendered)} samples has an assistant turn to learn from.",
            )
        kept = [(c.key, item) for c, samples in rendered if (item := self._fit(c, samples))]
        if not kept:
            raise self._all_too_long(source, self._rules.max_seq_len)
        self._check_stops(source, (_telling(item) for _, item in kept))
        return list(kept)

    def _versions(self, source: Source, conversation: Conversation) -> list[Sample]:
        versions = [conversation.messages]
        if conversation.rejected is not None:
            versions.append(conversation.rejected)
        return [self._sample(source, conversation.place, messages) for messages in versions]

    def _sample(self, source: Source, place: str, messages: Messages) -> Sample:
        try:
            token_ids, is_assistant = self._renderer.render_for_training(messages)
        except MizzenError as error:
            raise DatasetRefusedByTemplateError(source.dataset.name, f"{place}: {error}") from error
        is_label_T = np.asarray(is_assistant, dtype=np.bool_)
        if self._rules.loss_on == "all":
            is_label_T = np.ones_like(is_label_T)
        # Nothing comes before the first token, so nobody can be asked to predict it.
        is_label_T[:1] = False
        return Sample(np.asarray(token_ids, dtype=np.int32), is_label_T)

    def _fit(
        self, conversation: Conversation, samples: list[Sample]
    ) -> Sample | Pair | Rating | None:
        """Return what fits of an item; None when that would teach nothing."""
        limit = self._rules.max_seq_len
        fitting = [Sample(s.token_ids_T[:limit], s.is_label_T[:limit]) for s in samples]
        is_cut = sum(map(len, fitting)) < sum(map(len, samples))
        is_dropped = is_cut and self._rules.on_overlong == "drop"
        if is_dropped or not all(s.labels for s in fitting) or _are_equal(fitting):
            self.cuts.dropped += 1
            return None
        self.cuts.truncated += is_cut
        if conversation.is_liked is not None:
            return Rating(fitting[0], conversation.is_liked)
        return fitting[0] if len(fitting) == 1 else Pair(*fitting)

    def _prompts(self, source: Source) -> list[tuple[bytes, Item]]:
        limit = self._rules.max_seq_len
        rendered = [(c, self._prompt_tokens(source, c)) for c in source.conversations]
        kept: list[tuple[bytes, Item]] = [
            (c.key, Prompt(np.asarray(token_ids, dtype=np.int32), c.answer))
            for c, token_ids in rendered
            if len(token_ids) <= limit
        ]
        self.cuts.dropped += len(rendered) - len(kept)
        if not kept:
            raise self._all_too_long(source, limit)
        return kept

    def _prompt_tokens(self, source: Source, conversation: Conversation) -> list[int]:
        try:
            return self._renderer.apply_chat_template(conversation.messages)
        except MizzenError as error:
            raise DatasetRefusedByTemplateError(
                source.dataset.name, f"{conversation.place}: {error}"
            ) from error

    def _check_stops(self, source: Source, samples: Iterable[Sample]) -> None:
        """Refuse data from which a model would unlearn to end its turn."""
        end_ids = np.asarray(self._renderer.eos_token_ids, dtype=np.int32)
        if not any(np.isin(s.token_ids_T[s.is_label_T], end_ids).any() for s in samples):
            raise DatasetNeverStopsError(
                source.dataset.name,
                "no label token ends a turn, so the model would never stop talking. "
                "Raise processing.maxSeqLen or use a chat template that ends assistant turns.",
            )

    @staticmethod
    def _all_too_long(source: Source, limit: int) -> DatasetEmptyError:
        return DatasetEmptyError(
            source.dataset.name,
            f"all {len(source.conversations)} samples are longer than {limit} tokens. "
            "Raise processing.maxSeqLen.",
        )


def _telling(item: Sample | Pair | Rating) -> Sample:
    """Return the version whose end tells whether turns end at all."""
    match item:
        case Pair(chosen=sample) | Rating(sample=sample):
            return sample
    return item


def _are_equal(samples: Sequence[Sample]) -> bool:
    """Whether nothing tells the two versions apart, perhaps because both were cut."""
    return len(samples) == 2 and np.array_equal(samples[0].token_ids_T, samples[1].token_ids_T)
