"""Guesses the next tokens, or keeps places for a draft model's guesses.

Without a draft model they come from the text itself: what followed the last few tokens before.

Source: Saxena, "Prompt lookup decoding" (2023). A guess costs little to check, because a step that
reads all weights for one token reads them for a few more at once.
"""

from collections.abc import Sequence
from typing import Protocol

LENGTH = 3  # of the n-gram; shorter ones recur too often by chance
MAX_RUNNING = 4  # beyond, a step is busy enough with tokens that are no guesses


class Guesser(Protocol):
    """Proposes what may follow."""

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may come next; `token_ids` only ever grows."""
        ...


class DraftPlaces:
    """Proposes nothing in particular: the draft model fills these places before the step."""

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return `count` places."""
        return [0] * count


class NgramIndex:
    """Where each n-gram of one sequence was last followed by something."""

    def __init__(self) -> None:
        self._follower_of: dict[tuple[int, ...], int] = {}
        self._seen = LENGTH

    def propose(self, token_ids: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may come next; `token_ids` only ever grows."""
        for position in range(self._seen, len(token_ids)):
            self._follower_of[tuple(token_ids[position - LENGTH : position])] = position
        self._seen = max(self._seen, len(token_ids))
        at = self._follower_of.get(tuple(token_ids[-LENGTH:]))
        return [] if at is None else list(token_ids[at : at + count])
