"""Turns a stream of tokens into a stream of text: no half characters, no part of a stop string."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mizzen.runtime.engine.token_bytes import byte_table
from mizzen.runtime.engine.tokenizer import Tokenizer

# A character has at most four bytes: when this many tokens still end in half a one, it is broken
# text, and waiting longer would only let the window grow without end.
MAX_PENDING_TOKENS = 6
REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True)
class Delta:
    """New text; `stop` is the stop string that ended it."""

    text: str
    stop: str | None = None


class Detokenizer:
    """Decodes one sequence's output tokens as they come."""

    def __init__(self, decode: "TokenDecoder", stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(text for text in stop if text)
        self._held = ""  # text that may turn out to be the beginning of a stop string

    def push(self, token_id: int, *, check_stop: bool = True) -> Delta:
        """Return the text that became certain with this token."""
        return self._release(self._decode.push(token_id), check_stop=check_stop)

    def finish(self) -> Delta:
        """Return what was held back; the sequence has ended for another reason."""
        text, self._held = self._held + self._decode.finish(), ""
        return Delta(text)

    def _release(self, text: str, *, check_stop: bool) -> Delta:
        if not self._stop:
            return Delta(text)
        if not text:
            return Delta("")
        text = self._held + text
        if check_stop and (found := _first_stop(text, self._stop)):
            position, stop = found
            self._held = ""
            return Delta(text[:position], stop)
        keep = max(overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return Delta(text[: len(text) - keep])


class TokenDecoder(ABC):
    """Decodes tokens to text, holding back bytes that are not a whole character yet."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """Return the text that is whole now."""

    @abstractmethod
    def finish(self) -> str:
        """Return what is left, broken or not."""


class ByteDecoder(TokenDecoder):
    """For byte-level vocabularies: every token is known bytes, so a step costs one look-up."""

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that is whole now."""
        # Models have more rows than their tokenizer has tokens, and any of them can be drawn.
        return self._utf8.decode(self._bytes_of[token_id]) if token_id < len(self._bytes_of) else ""

    def finish(self) -> str:
        """Return what is left, broken or not."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder(TokenDecoder):
    """For every other vocabulary: decode a short window before and after the new token."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special: frozenset[int],
        before: Sequence[int] = (),
    ) -> None:
        """Decode what follows the tokens `before`; without any, a text's beginning."""
        self._decode = decode
        self._special = special
        # Decoded already; decides how the next text joins on.
        self._context = [token for token in before[-MAX_PENDING_TOKENS:] if token not in special]
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that is whole now."""
        if token_id in self._special:
            return ""
        self._pending.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._pending) < MAX_PENDING_TOKENS:
            return ""
        return self._take(text)

    def finish(self) -> str:
        """Return what is left, broken or not."""
        return self._take(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._pending])[len(before) :]

    def _take(self, text: str) -> str:
        if self._pending:
            self._context = self._pending[-MAX_PENDING_TOKENS:]
            self._pending = []
        return text


class DetokenizerFactory:
    """Chooses once how a tokenizer's tokens are decoded, and makes a detokenizer per sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_of = byte_table(tokenizer)

    def make(self, stop: Sequence[str] = (), *, before: Sequence[int] = ()) -> Detokenizer:
        """Return a detokenizer for a new sequence, whose text goes on after the tokens `before`."""
        if self._bytes_of is not None:
            return Detokenizer(ByteDecoder(self._bytes_of), stop)
        tokenizer = self._tokenizer
        return Detokenizer(WindowDecoder(tokenizer.decode, tokenizer.special_ids, before), stop)


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    found = [(position, stop) for stop in stops if (position := text.find(stop)) >= 0]
    return min(found, default=None)


def overlap(text: str, stop: str) -> int:
    """Return how many last characters of `text` may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
