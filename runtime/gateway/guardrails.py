"""Checks of what goes into a model and of what comes out. Pure.

Patterns are RE2's: their time is linear in the text, so no text can make a gateway stand still.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import re2

from mizzen.runtime.gateway.errors import BadBodyError, GatewayError
from mizzen.runtime.gateway.texts import Place, map_texts, texts_of

log = logging.getLogger(__name__)

_REDACTED = "[redacted]"


class RefusedByGuardrailError(BadBodyError):
    """A guardrail does not let the request through."""

    code = "content_filter"

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"The guardrail {name!r} of this model refuses the request: {why}.")
        self.guardrail = name


class GuardrailFailedError(GatewayError):
    """A check cannot be made, and nothing goes unchecked."""

    code = "guardrail_failed"

    def __init__(self, name: str, why: object) -> None:
        super().__init__(
            f"The guardrail {name!r} of this model fails ({why}), so it answers nothing. Mend "
            "spec.guardrails in its LLMDeployment."
        )


@dataclass(frozen=True, slots=True)
class Guardrail:
    """One check."""

    name: str
    is_output: bool
    deny: tuple[str, ...] = ()
    max_chars: int | None = None
    redacts: bool = False
    fails_open: bool = False

    def patterns(self) -> list[Any]:
        """Return its patterns ready to use, none where one is wrong and that is allowed.

        Raises:
            GuardrailFailedError: one is wrong.
        """
        found = [_compiled(pattern) for pattern in self.deny]
        wrong = next((one for one in found if isinstance(one, re2.error)), None)
        if wrong is None:
            return found
        if self.fails_open:
            return []
        why = wrong.args[0] if wrong.args else wrong
        text = why.decode(errors="replace") if isinstance(why, bytes) else why
        raise GuardrailFailedError(self.name, text)

    def first_hit(self, text: str) -> int | None:
        """Return where the first thing begins that no text may have."""
        clean = readable(text)
        found = (pattern.search(clean) for pattern in self.patterns())
        return min((hit.start() for hit in found if hit is not None), default=None)


def check_request(document: dict[str, object], rails: Sequence[Guardrail]) -> dict[str, object]:
    """Return the request as the guardrails let it through.

    Raises:
        RefusedByGuardrailError, GuardrailFailedError: they do not.
    """
    for rail in rails:
        patterns = rail.patterns()
        if rail.is_output:
            continue
        if rail.redacts:
            document = map_texts(document, partial(_blacked_out, patterns=patterns), Place.REQUEST)
            _refuse_tokens(rail, document)
            continue
        _refuse_tokens(rail, document)
        texts = texts_of(document, Place.REQUEST)
        if any(rail.first_hit(text) is not None for text in texts):
            raise RefusedByGuardrailError(rail.name, "it has what no text may have")
        size = sum(map(len, texts))
        if rail.max_chars is not None and size > rail.max_chars:
            why = f"it has {size} characters, and {rail.max_chars} are allowed"
            raise RefusedByGuardrailError(rail.name, why)
    return document


def refuse_scores(rails: Sequence[Guardrail]) -> None:
    """Refuse to say how likely tokens are where answers are checked: that shows them unchecked.

    Raises:
        RefusedByGuardrailError: answers are checked.
    """
    for rail in rails:
        if rail.is_output:
            why = "scores cannot be checked, so leave out 'prompt_logprobs' and 'prompt_samples'"
            raise RefusedByGuardrailError(rail.name, why)


def refuse_streamed_logprobs(document: dict[str, object], rails: Sequence[Guardrail]) -> None:
    """Refuse log probabilities in a stream whose text is checked: tokens come before their text.

    Raises:
        RefusedByGuardrailError: answers are checked.
    """
    is_asked = document.get("logprobs") is not None and document.get("logprobs") is not False
    if not is_asked or not document.get("stream"):
        return
    for rail in rails:
        if rail.is_output:
            why = "the tokens of 'logprobs' cannot be checked in a stream, so leave out one of both"
            raise RefusedByGuardrailError(rail.name, why)


def _refuse_tokens(rail: Guardrail, document: dict[str, object]) -> None:
    # Only what is text for sure may pass, whatever a runtime would make of "15" or 15.0.
    for name in ("prompt", "input"):
        given = document.get(name)
        is_template = name == "prompt" and isinstance(given, dict)
        texts = given if isinstance(given, list) else [given]
        if given is None or is_template or all(isinstance(text, str) for text in texts):
            continue
        why = f"{name!r} must be text, not tokens: a string or a list of strings"
        raise RefusedByGuardrailError(rail.name, why)


def _blacked_out(text: str, patterns: Sequence[Any]) -> str:
    clean = readable(text)
    for pattern in patterns:
        clean = pattern.sub(_REDACTED, clean)
    return clean


def readable(text: str) -> str:
    """Return a text without halves of characters, which JSON can hold and UTF-8 cannot."""
    return text.encode(errors="replace").decode()


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
    """Return a pattern ready to use, or what is wrong with it: said in the log once."""
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        log.warning("a guardrail's pattern %r is not RE2's: %s", pattern, error)
        # Without its traceback, which would keep every frame of the request.
        return error.with_traceback(None)
