"""Conversations become labelled tokens that fit, as the serving tokenizer's template says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
from mizzen.runtime.train.records import Conversation, Messages, Shape
from mizzen.runtime.train.samples import Item, Pair, Prompt, Rating, Sample


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """What became of a sample; without an item it was too long or taught nothing."""

    key: bytes
    item: Item | None
    is_truncated: bool = False
    has_labels: bool = True  # before it was cut
    ends_turn: bool = True  # a label ends a turn


@dataclass(slots=True)
class Tally:
    """What became of the samples of a dataset, or of a part of it."""

    samples: int = 0
    truncated: int = 0
    kept: int = 0
    labelled: int = 0
    ending: int = 0

    def add(self, rendered: Rendered) -> None:
        """Count one more."""
        self.samples += 1
        self.truncated += rendered.is_truncated
        self.kept += rendered.item is not None
        self.labelled += rendered.has_labels
        self.ending += rendered.item is not None and rendered.ends_turn

    def __iadd__(self, other: Tally) -> Tally:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    @property
    def dropped(self) -> int:
        """Samples of which nothing is learned."""
        return self.samples - self.kept

    def check(self, dataset: str, limit: int) -> None:
        """Refuse a dataset from which a model would learn nothing, or never how to stop.

        Raises:
            DatasetError: the text says what to change; `limit` is the longest sample's tokens.
        """
        if not self.labelled:
            raise DatasetNoAssistantTurnsError(
                dataset, f"none of its {self.samples} samples has an assistant turn to learn from."
            )
        if not self.kept:
            raise DatasetEmptyError(
                dataset,
                f"all {self.samples} samples are longer than {limit} tokens. "
                "Raise processing.maxSeqLen.",
            )
        if not self.ending:
            raise DatasetNeverStopsError(
                dataset,
                "no label token ends a turn, so the model would never stop talking. "
                "Raise processing.maxSeqLen or use a chat template that ends assistant turns.",
            )


class SampleRenderer:
    """Renders the samples of one dataset."""

    def __init__(
        self, renderer: ChatRenderer, rules: Processing, *, dataset: str, shape: Shape
    ) -> None:
        self._renderer = renderer
        self._rules = rules
        self._dataset = dataset
        self._shape = shape
        self._end_ids = frozenset(renderer.eos_token_ids)

    def render(self, conversation: Conversation) -> Rendered:
        """Return what is learned from a sample.

        Raises:
            DatasetRefusedByTemplateError: the model's template cannot render it.
        """
        if self._shape == "prompt":
            token_ids = self._prompt_tokens(conversation)
            fits = len(token_ids) <= self._rules.max_seq_len
            prompt = Prompt(np.asarray(token_ids, dtype=np.int32), conversation.answer)
            return Rendered(key=conversation.key, item=prompt if fits else None)
        versions = [conversation.messages]
        if conversation.rejected is not None:
            versions.append(conversation.rejected)
        samples = [self._sample(conversation.place, messages) for messages in versions]
        return self._fit(conversation, samples)

    def _sample(self, place: str, messages: Messages) -> Sample:
        try:
            token_ids, is_assistant = self._renderer.render_for_training(messages)
        except MizzenError as error:
            raise DatasetRefusedByTemplateError(self._dataset, f"{place}: {error}") from error
        is_label_T = np.asarray(is_assistant, dtype=np.bool_)
        if self._rules.loss_on == "all":
            is_label_T = np.ones_like(is_label_T)
        # Nothing comes before the first token, so nobody can be asked to predict it.
        is_label_T[:1] = False
        return Sample(np.asarray(token_ids, dtype=np.int32), is_label_T)

    def _fit(self, conversation: Conversation, samples: list[Sample]) -> Rendered:
        """Return what fits of a sample, if that would teach anything."""
        limit = self._rules.max_seq_len
        fitting = [Sample(s.token_ids_T[:limit], s.is_label_T[:limit]) for s in samples]
        is_cut = sum(map(len, fitting)) < sum(map(len, samples))
        is_dropped = is_cut and self._rules.on_overlong == "drop"
        has_labels = samples[0].labels > 0
        if is_dropped or not all(s.labels for s in fitting) or _are_equal(fitting):
            return Rendered(key=conversation.key, item=None, has_labels=has_labels)
        telling = fitting[0]
        return Rendered(
            key=conversation.key,
            item=_item(conversation, fitting),
            is_truncated=is_cut,
            has_labels=has_labels,
            ends_turn=not self._end_ids.isdisjoint(
                telling.token_ids_T[telling.is_label_T].tolist()
            ),
        )

    def _prompt_tokens(self, conversation: Conversation) -> list[int]:
        try:
            return self._renderer.apply_chat_template(conversation.messages)
        except MizzenError as error:
            raise DatasetRefusedByTemplateError(
                self._dataset, f"{conversation.place}: {error}"
            ) from error


def _item(conversation: Conversation, samples: Sequence[Sample]) -> Item:
    if conversation.is_liked is not None:
        return Rating(samples[0], conversation.is_liked)
    return samples[0] if len(samples) == 1 else Pair(*samples)


def _are_equal(samples: Sequence[Sample]) -> bool:
    """Whether nothing tells the two versions apart, perhaps because both were cut."""
    return len(samples) == 2 and np.array_equal(samples[0].token_ids_T, samples[1].token_ids_T)
