"""A step on its way: launched with tokens that may not be known yet, read when it has landed.

On a GPU `launch` only queues work and `read` waits for it, so the loop decides and launches the
next step between the two.
"""

from dataclasses import dataclass

from mizzen.runtime.engine.batch import BatchBuilder
from mizzen.runtime.engine.ranks import ModelRanks
from mizzen.runtime.engine.sampler import Choice, Sampler
from mizzen.runtime.engine.scheduler import Chunk
from mizzen.runtime.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Flight:
    """What a step computes, and what it has chosen or will have."""

    chunks: list[Chunk]
    began_at: float
    row_of: dict[Sequence, int]  # where each sequence's token, or its first guess, is sampled
    choice: Choice | None  # None: it only computes parts of prompts
    embeddings: dict[Sequence, list[float]]


class Launcher:
    """Has steps computed and sampled from; belongs to the loop alone."""

    def __init__(self, *, builder: BatchBuilder, ranks: ModelRanks, sampler: Sampler) -> None:
        self._builder = builder
        self._ranks = ranks
        self._sampler = sampler

    def launch(self, chunks: list[Chunk], before: Flight | None, *, now: float) -> Flight:
        """Launch a step; `before` is the one in flight, which samples what this one lacks."""
        self._ranks.guess(chunks)
        step = self._builder.build(chunks, before.row_of if before else {})
        known_N = before.choice.token_ids_N if before and before.choice else None
        logits_NV = self._ranks.run(step, known_N)
        rows: list[Sequence] = []
        outputs: list[int] = []  # tokens of output before each row's
        row_of: dict[Sequence, int] = {}
        for chunk in chunks:
            if chunk.samples:
                row_of[chunk.seq] = len(rows)
                first = chunk.start + chunk.count - chunk.seq.prompt_tokens
                rows += [chunk.seq] * (1 + len(chunk.draft))
                outputs += range(first, first + 1 + len(chunk.draft))
        embeddings = {
            seq: self._ranks.last_hidden(row) for seq, row in row_of.items() if seq.sampling.embed
        }
        choice = None
        if logits_NV is not None:
            choice = self._sampler.choose(logits_NV, rows, outputs)
        return Flight(chunks, now, row_of, choice, embeddings)
