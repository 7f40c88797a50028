"""Prompts of random tokens: their text does not matter and nothing of them is cached."""

from __future__ import annotations

import random

Prompts = list[list[int]]


def random_prompts(
    count: int, *, shortest: int, longest: int, vocab_size: int, seed: int
) -> Prompts:
    """Draw prompts of evenly spread lengths."""
    rng = random.Random(seed)
    return [
        [rng.randrange(vocab_size) for _ in range(rng.randint(shortest, longest))]
        for _ in range(count)
    ]
