"""A teacher: another model that speaks of the very same tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import find_checkpoint
from mizzen.runtime.train.errors import TeacherTokenizerError


def check_same_tokens(student: Tokenizer, teacher_path: Path) -> None:
    """Refuse a teacher whose ids mean other tokens: training would go on, on nonsense.

    Raises:
        TeacherTokenizerError: the vocabularies differ.
    """
    of_student = vocabulary_digest(student)
    of_teacher = vocabulary_digest(Tokenizer.load(find_checkpoint(teacher_path)))
    if of_student != of_teacher:
        raise TeacherTokenizerError(student=of_student, teacher=of_teacher)


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Return the sha256 of what each token id means."""
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
