"""Answers that must follow a grammar: a JSON schema, a regular expression, a choice, Lark rules.

llguidance does the work, and is imported with the first grammar. One is compiled away from the
event loop and the engine's loop, under limits on its size and on the work of one step, so that a
hostile one costs its own request and nobody else's.
"""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mizzen.runtime.engine.api import JSON_ON_ONE_LINE, Grammar
from mizzen.runtime.engine.errors import EngineBusyError, InvalidRequestError
from mizzen.runtime.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_LIMIT_S = 5.0
MAX_SOURCE_CHARS = 256 * 1024
# What is remembered takes some 60 bytes for a character of its source.
MAX_KEPT, MAX_KEPT_CHARS = 128, 1024 * 1024
# A mask of a sane grammar takes a tenth of a millisecond; every other sequence waits for it.
STEP_FUEL, STEP_ITEMS, LEXER_STATES = 50_000, 20_000, 100_000


class GrammarState:
    """One sequence's place in its grammar. Used by one thread at a time."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def allowed(self) -> NDArray[np.bool_]:
        """Return for each token whether it may come next; the end tokens only where text may end.

        Raises:
            InvalidRequestError: the grammar became too costly, or nothing can satisfy it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or not bits.any():
            raise _refusal(self._matcher.get_error() or "no token can come next")
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def advance(self, token_id: int) -> bool:
        """Take the chosen token; return whether the text is complete with it."""
        self._matcher.consume_token(token_id)
        # An error also stops a matcher; the next `allowed` is where it is told.
        return self._matcher.is_stopped() and not self._matcher.is_error()


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and remembers the last ones."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._eos_ids = eos_ids
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="mizzen-grammar")
        self._kept: dict[Grammar, LLMatcher] = {}  # the last used last; belongs to that thread
        self._vocabulary = lru_cache(maxsize=1)(self._load_vocabulary)

    async def start(self, grammar: Grammar) -> GrammarState:
        """Return the beginning of a text that follows `grammar`.

        Raises:
            InvalidRequestError: it is broken, or too large or too costly.
            EngineBusyError: too many others are being compiled.
        """
        if len(grammar.source) > MAX_SOURCE_CHARS:
            raise _refusal(f"it has over {MAX_SOURCE_CHARS} characters")
        loop, begun = asyncio.get_running_loop(), threading.Event()

        def begin() -> GrammarState:
            begun.set()
            return GrammarState(self._matcher(grammar).deep_copy())

        try:
            async with asyncio.timeout(COMPILE_LIMIT_S):
                return await loop.run_in_executor(self._threads, begin)
        except TimeoutError as error:
            if begun.is_set():
                raise _refusal(f"compiling it took over {COMPILE_LIMIT_S:.0f} s") from error
            raise EngineBusyError(
                "The grammars of other requests are being compiled. Try again later.",
                retry_after_s=COMPILE_LIMIT_S,
            ) from error

    def _matcher(self, grammar: Grammar) -> "LLMatcher":
        kept = self._kept
        kept[grammar] = matcher = kept.pop(grammar) if grammar in kept else self._compile(grammar)
        while len(kept) > MAX_KEPT or sum(len(each.source) for each in kept) > MAX_KEPT_CHARS:
            del kept[next(iter(kept))]
        return matcher

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415 - few replicas need it

        try:
            source = _to_llguidance(grammar)
        except ValueError as error:
            raise _refusal(str(error)) from error
        limits = LLParserLimits(
            step_lexer_fuel=STEP_FUEL, step_max_items=STEP_ITEMS, max_lexer_states=LEXER_STATES
        )
        matcher = LLMatcher(self._vocabulary(), source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # much is found out, and paid for, only by the first mask
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        if matcher.is_stopped():
            raise _refusal("it allows no text")
        return matcher

    def _load_vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer  # noqa: PLC0415 - few replicas need it

        try:
            return LLTokenizer(
                self._tokenizer.backend.to_str(),
                n_vocab=self._vocab_size,
                eos_token=list(self._eos_ids),
            )
        except (ValueError, RuntimeError) as error:
            raise _refusal(f"this model's vocabulary cannot be constrained ({error})") from error


def _to_llguidance(grammar: Grammar) -> str:
    from llguidance import LLMatcher  # noqa: PLC0415 - few replicas need it

    match grammar.kind:
        case "json_schema":
            layout: Any = JSON_ON_ONE_LINE  # its stub wants every key optional
            return LLMatcher.grammar_from_json_schema(grammar.source, defaults=layout)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.source)


def _refusal(reason: str) -> InvalidRequestError:
    first = reason.partition("\n<state>")[0].strip()
    return InvalidRequestError(
        f"The grammar cannot be used: {first[:500]}. Simplify the schema or the expression."
    )
