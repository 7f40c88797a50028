"""Checks of what goes into a model and of what comes out. Pure.

Patterns are RE2's: their time is linear in the text, so no text can make a gateway stand still.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import re2

from mizzen.runtime.gateway.errors import BadBodyError, GatewayError

log = logging.getLogger(__name__)

_REDACTED = "[redacted]"
# Names, not text: a guardrail that blacked them out would break the request.
_NOT_TEXT = frozenset(("model", "role", "type", "id"))


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
        try:
            return [_compiled(pattern) for pattern in self.deny]
        except re2.error as error:
            if self.fails_open:
                return []
            why = error.args[0] if error.args else error
            text = why.decode(errors="replace") if isinstance(why, bytes) else why
            raise GuardrailFailedError(self.name, text) from None

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
            document = {name: _redacted(name, v, patterns) for name, v in document.items()}
            _refuse_tokens(rail, document)
            continue
        _refuse_tokens(rail, document)
        texts = list(texts_of(document))
        if any(rail.first_hit(text) is not None for text in texts):
            raise RefusedByGuardrailError(rail.name, "it has what no text may have")
        size = sum(map(len, texts))
        if rail.max_chars is not None and size > rail.max_chars:
            why = f"it has {size} characters, and {rail.max_chars} are allowed"
            raise RefusedByGuardrailError(rail.name, why)
    return document


def _refuse_tokens(rail: Guardrail, document: dict[str, object]) -> None:
    for name in ("prompt", "input"):
        if any(isinstance(leaf, int) for leaf in _leaves(document.get(name))):
            raise RefusedByGuardrailError(rail.name, f"{name!r} must be text, not tokens")


def texts_of(node: object) -> Iterator[str]:
    """Yield every text in a document."""
    for leaf in _leaves(node):
        if isinstance(leaf, str):
            yield leaf


def _leaves(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name not in _NOT_TEXT:
                yield from _leaves(value)
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value)
    else:
        yield node


def _redacted(name: str, node: object, patterns: Sequence[Any]) -> Any:
    if name in _NOT_TEXT:
        return node
    if isinstance(node, dict):
        return {key: _redacted(key, value, patterns) for key, value in node.items()}
    if isinstance(node, list):
        return [_redacted("", value, patterns) for value in node]
    return _blacked_out(node, patterns) if isinstance(node, str) else node


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
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        log.warning("a guardrail's pattern %r is not RE2's: %s", pattern, error)
        raise
