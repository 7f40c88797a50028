"""A teacher: another model that speaks of the very same tokens, in this process or served.

A served one is asked for what it thinks of given tokens, which its replicas do when nobody asks
them for text. So it may well be busy; then it is asked again, for as long as nobody wants this job
to yield.
"""

# Shapes: N scored tokens of a sample, K ids drawn at each.
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.train.asking import BUSY, Asker, has_no_numbers
from mizzen.runtime.train.copies import Row, ask_out, pack_rows, unpack_rows
from mizzen.runtime.train.errors import (
    JobConfigError,
    TeacherNotFiniteError,
    TeacherTokenizerError,
    TeacherUnavailableError,
)
from mizzen.runtime.train.options import ServedModel
from mizzen.runtime.train.samples import Floats, Sample
from mizzen.runtime.train.stop import Stop
from mizzen.runtime.train.surroundings import Surroundings
from mizzen.runtime.train.together import Together

_ANSWER_S = 60.0
_RETRIES = 60  # half an hour of being told to come back, at half a minute each at last


def check_same_tokens(student: Tokenizer, teacher_path: Path) -> None:
    """Refuse a teacher whose ids mean other tokens: training would go on, on nonsense.

    Raises:
        TeacherTokenizerError: the vocabularies differ.
    """
    teacher = Tokenizer.load(find_checkpoint(teacher_path))
    _check_digests(student.vocabulary_digest, teacher.vocabulary_digest)


def _check_digests(student: str, teacher: str) -> None:
    if student != teacher:
        raise TeacherTokenizerError(student=student, teacher=teacher)


class ServedTeacher:
    """A model that a deployment serves, asked over HTTP by one worker of each copy."""

    def __init__(
        self, where: ServedModel, around: Surroundings, *, retries: int = _RETRIES
    ) -> None:
        self._where = where
        self._vocabulary = around.tokenizer.vocabulary_digest
        self._stop = around.stop
        self._workers = around.workers
        self._device = around.device
        self._asker = Asker(
            where,
            "/v1/completions",
            api_key=around.teacher_api_key,
            retries=retries,
            answer_s=_ANSWER_S,
        )

    def draw(self, samples: Sequence[Sample], *, count: int, seeds: Sequence[int]) -> list[Tensor]:
        """Return `count` ids drawn where each label is to be predicted, drawn_NK a sample.

        The ranks of one copy ask together. Raises as `log_probs` does.
        """
        asked = [
            {"prompt": sample.token_ids_T.tolist(), "prompt_samples": count, "seed": seed}
            for sample, seed in zip(samples, seeds, strict=True)
        ]

        def ask(stop: Stop) -> bytes:
            choices = zip(samples, self._ask_all(asked, stop), strict=True)
            drawn = (_labelled(sample, choice["prompt_samples"]) for sample, choice in choices)
            return pack_rows([{"drawn_NK": np.asarray(ids, np.int32)} for ids in drawn])

        said = Together(self._workers.tensor, self._device).from_leader(ask, self._stop)
        return [torch.tensor(row["drawn_NK"]) for row in unpack_rows(said)]

    def log_probs(self, samples: Sequence[Sample]) -> list[Floats]:
        """Return each label's log-probability; all workers ask together, each copy for a share.

        Raises:
            YieldRequested: somebody wants this job to stop.
            RankLostError: another worker is gone, perhaps since the teacher gave it no answer.
            TeacherTokenizerError: the teacher's ids mean other tokens.
            JobConfigError: the deployment refuses the question.
            TeacherNotFiniteError: the teacher's numbers overflow on a sample.
            TeacherUnavailableError: it was busy or away for too long.
        """
        rows = ask_out(
            samples,
            self._scored,
            workers=self._workers,
            device=self._device,
            stop=self._stop,
        )
        return [row["log_probs_N"] for row in rows]

    def _scored(self, samples: Sequence[Sample], stop: Stop) -> list[Row]:
        asked = [{"prompt": s.token_ids_T.tolist(), "prompt_logprobs": 0} for s in samples]
        found = []
        for sample, choice in zip(samples, self._ask_all(asked, stop), strict=True):
            places = [
                0.0 if place is None else place[str(token_id)]["logprob"]
                for token_id, place in zip(
                    sample.token_ids_T.tolist(), choice["prompt_logprobs"], strict=True
                )
            ]
            found.append({"log_probs_N": np.asarray(_labelled(sample, places), np.float32)})
        return found

    def _ask_all(self, asked: Sequence[dict[str, Any]], stop: Stop) -> list[dict[str, Any]]:
        questions = [{"max_tokens": 0, **fields} for fields in asked]
        try:
            return self._asker.ask_all(questions, self._read, stop)
        except urllib3.exceptions.HTTPError as error:
            raise TeacherUnavailableError(
                f"The teacher at {self._where.url} cannot be reached: {type(error).__name__}. "
                "Check that the deployment has a replica."
            ) from error

    def _read(self, answer: urllib3.BaseHTTPResponse) -> dict[str, Any]:
        where = self._where
        if has_no_numbers(answer):
            raise TeacherNotFiniteError(where.model)
        if answer.status in BUSY:
            raise TeacherUnavailableError(
                f"The teacher {where.model} had no idle moment: it last answered "
                f"{answer.status}. Give its deployment more replicas, or run at a quieter time."
            )
        if answer.status != 200:
            raise JobConfigError(
                f"The teacher {where.model} refuses to say what it thinks of tokens: "
                f"{answer.data.decode(errors='replace')[:300]}"
            )
        try:
            document = answer.json()
            vocabulary, choice = document["vocabulary"], document["choices"][0]
        except (ValueError, LookupError, TypeError) as error:
            raise JobConfigError(
                f"{where.url} does not say which vocabulary {where.model} has. Name a deployment "
                "of this installation."
            ) from error
        _check_digests(self._vocabulary, vocabulary)
        return dict(choice)


def _labelled(sample: Sample, places: Sequence[Any]) -> list[Any]:
    """Return what was said of the labels; the first token is never one, nothing comes before it."""
    return [places[at] for at in np.flatnonzero(sample.is_label_T).tolist() if at > 0]
