"""Decides what a step computes. Plain values only: no clock, no tensor, no thread.

There are no phases: each sequence has computed tokens chasing known tokens, and a step hands out a
budget of tokens, running sequences first, then waiting ones. Chunked prefill, prefix hits, decode
and recomputation after preemption all follow from that rule.

A step may be decided while the one before it is still being computed: its sequences then count as
they will be once that one has landed, each with one more token that nobody knows yet. What ends
meanwhile keeps its blocks until no step in flight writes to them.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from mizzen.runtime.engine.api import FinishReason
from mizzen.runtime.engine.blocks import BlockPool, next_hash
from mizzen.runtime.engine.errors import EngineBusyError, PromptTooLongError
from mizzen.runtime.engine.sequence import Sequence, State
from mizzen.runtime.engine.speculation import MAX_RUNNING, Guesser

ORDER = attrgetter("order")
RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
# How much larger pieces of prompts are for each further prompt per running stream. In large pieces
# or small, prompts cost the streams the same in all: small ones spread it, and whoever waits pays
# for that. 32 prompts at once on two cores, SmolLM2-135M: 637, 716 and 775 tokens a second with 0,
# 4 and 8.
CROWD = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler must never exceed."""

    step_tokens: int
    beside_decodes: int  # a lone prompt's tokens in a step in which others decode: `_budget`
    even_context: int | None  # where attention costs a token what its products do
    max_running: int
    model_len: int
    max_waiting: int
    max_waiting_tokens: int
    draft_tokens: int = 0  # guessed for a sequence in one step


def tokens_worth(work: float, *, context: int, even_context: int | None) -> int:
    """Return how many tokens of a prompt cost the products of `work` tokens; at least one.

    Each is attended to all before it: the more there are, the fewer tokens take as long.
    `even_context` is where attention costs as much as the products; without it, it costs nothing.
    """
    cost = 1 + context / even_context if even_context else 1
    return max(1, int(work / cost))


@dataclass(slots=True)
class Chunk:
    """One sequence's share of a step: `count` tokens from position `start`, then guesses.

    A chunk with guesses samples at its last known token and at each guess.
    """

    seq: Sequence
    start: int
    count: int
    samples: bool  # it reaches the last token, so that a new one follows
    draft: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many tokens it computes."""
        return self.count + len(self.draft)


class Scheduler:
    """Keeps the queues; `schedule`, run, `advance`, then `finish` those that ended."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        if pool.total * pool.block_size < limits.model_len:
            raise ValueError("the KV cache must hold one sequence of full length")
        if limits.step_tokens < limits.max_running:
            raise ValueError("the step's tokens must suffice for one token of each sequence")
        self.pool = pool
        self.limits = limits
        self.running: list[Sequence] = []  # in order: the last one is preempted first
        self.waiting: list[Sequence] = []
        self.waiting_tokens = 0
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.tokens_per_s = 0.0  # as last observed; makes `retry_after_s` honest
        self._rows = list(range(limits.max_running - 1, -1, -1))
        self._aborted: list[Sequence] = []
        self._ended_in_flight = 0  # sequences that still hold blocks

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.running or self.waiting or self._aborted)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            PromptTooLongError: it leaves no room for one output token.
            EngineBusyError: the queue is at its limit.
        """
        limits = self.limits
        if seq.prompt_tokens >= limits.model_len:
            raise PromptTooLongError(prompt_tokens=seq.prompt_tokens, model_len=limits.model_len)
        tokens_after = self.waiting_tokens + len(seq.token_ids)
        if len(self.waiting) >= limits.max_waiting:
            raise EngineBusyError(
                f"{len(self.waiting)} requests wait already. Try again later, or add replicas.",
                retry_after_s=self._retry_after_s(),
            )
        if self.waiting and tokens_after > limits.max_waiting_tokens:
            raise EngineBusyError(
                f"{self.waiting_tokens} prompt tokens wait already. Try again later, or add "
                "replicas.",
                retry_after_s=self._retry_after_s(),
            )
        self._enqueue(seq)

    def abort(self, seq: Sequence) -> None:
        """Mark a sequence to end before the next step; legal in every state, any number of times.

        Its blocks stay for as long as a step in flight may write to them.
        """
        if not seq.abort_wanted and seq.state is not State.FINISHED:
            seq.abort_wanted = True
            self._aborted.append(seq)

    def reap(self) -> list[Sequence]:
        """End the sequences marked by `abort` and return them."""
        ended = [seq for seq in self._aborted if seq.state is not State.FINISHED]
        for seq in ended:
            self.finish(seq, "abort")
        self._aborted.clear()
        return ended

    def may_run_ahead(self) -> bool:
        """Whether the next step can be decided before the tokens of the one in flight are known.

        It cannot where a sequence's next step hangs on its tokens, or where one may have to be
        preempted: its place would be given away while it is being computed.
        """
        blocks = sum(
            max(0, self.pool.blocks_for(seq.length) - len(seq.blocks)) for seq in self.running
        )
        return blocks <= self.pool.free and not any(seq.needs_tokens for seq in self.running)

    def schedule(self) -> list[Chunk]:
        """Return the next step's chunks, in flight from now on; `advance` lands them.

        While another step is in flight, `may_run_ahead` comes first.
        """
        budget = self._budget()
        chunks, preempted = self._schedule_running(budget)
        if not preempted:
            self._schedule_waiting(chunks, budget - sum(chunk.size for chunk in chunks))
        for chunk in chunks:
            chunk.seq.computing += chunk.count
            chunk.seq.sampling_now += chunk.samples
        # Single tokens first: attention treats them as one block.
        return sorted(chunks, key=lambda chunk: chunk.size > 1)

    def advance(self, chunks: Iterable[Chunk]) -> None:
        """Note that the chunks were computed, and offer blocks that became full to others."""
        for chunk in chunks:
            seq = chunk.seq
            seq.computing -= chunk.count
            seq.sampling_now -= chunk.samples
            if seq.state is State.RUNNING:
                self._computed(seq, chunk.start + chunk.count)
            elif not seq.computing:
                self._ended_in_flight -= 1
                self._release(seq)

    def accept(self, chunk: Chunk, right: int) -> None:
        """Note how many guesses were right; the tokens are known by now."""
        self.draft_tokens += len(chunk.draft)
        self.accepted_tokens += right
        if right and chunk.seq.state is State.RUNNING:
            self._computed(chunk.seq, chunk.seq.computed + right)

    def _computed(self, seq: Sequence, end: int) -> None:
        size = self.pool.block_size
        for index in range(seq.computed // size, end // size):
            self.pool.remember(seq.blocks[index], self._hash(seq, index))
        seq.computed = end

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """End a sequence and give back what it holds, at the latest when its step has landed."""
        if seq.state is State.RUNNING:
            self.running.remove(seq)
            if seq.computing:
                self._ended_in_flight += 1
            else:
                self._release(seq)
        elif seq.state is State.WAITING:
            self.waiting.remove(seq)
            self.waiting_tokens -= len(seq.token_ids)
        seq.state = State.FINISHED
        seq.finish_reason = reason

    def check(self) -> None:
        """Raise AssertionError unless blocks and rows in use are exactly the running ones'."""
        self.pool.check()
        held = len(self.running) + self._ended_in_flight
        assert len(self._rows) + held == self.limits.max_running, "rows are lost"
        if not held:
            assert self.pool.used == 0, f"{self.pool.used} blocks are held by nobody"

    def _budget(self) -> int:
        limits = self.limits
        prompts = [seq for seq in self.running if seq.length - seq.planned > 1]
        decoding = sum(1 for seq in self.running if seq.length - seq.planned == 1)
        if not decoding:
            return limits.step_tokens
        waiting = len(prompts) + min(len(self.waiting), len(self._rows))
        crowd = 1 + CROWD * max(0, waiting - 1) / decoding
        beside = tokens_worth(
            limits.beside_decodes * crowd,
            context=max((seq.planned for seq in prompts), default=0),
            even_context=limits.even_context,
        )
        # Each running sequence gets a token, whatever the limit says.
        return min(limits.step_tokens, max(len(self.running), decoding + beside))

    def _schedule_running(self, budget: int) -> tuple[list[Chunk], bool]:
        chunks: list[Chunk] = []
        preempted = False
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            if seq.is_ending:
                position += 1
                continue
            # One token is kept for each one behind, so a long prompt never stops their decode.
            behind = len(self.running) - position - 1
            count = min(seq.length - seq.planned, budget - behind)
            missing = self.pool.blocks_for(seq.planned + count) - len(seq.blocks)
            while missing > self.pool.free:
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is seq:
                    return chunks, True
            if missing > 0:
                seq.blocks += self.pool.allocate(missing)
            chunk = _chunk(seq, count)
            if seq.guesser is not None and chunk.samples:
                chunk.draft = self._draft(seq, seq.guesser, budget - behind - count, behind=behind)
            chunks.append(chunk)
            budget -= chunk.size
            position += 1
        return chunks, preempted

    def _draft(self, seq: Sequence, guesser: Guesser, room: int, *, behind: int) -> list[int]:
        """Return guesses, with blocks for them; guessing takes nothing from anybody else."""
        if len(self.running) > MAX_RUNNING or self.waiting:
            return []
        room = min(room, self.limits.draft_tokens, seq.max_tokens - seq.output_tokens - 1)
        draft = guesser.propose(seq.token_ids, room) if room > 0 else []
        missing = self.pool.blocks_for(len(seq.token_ids) + len(draft)) - len(seq.blocks)
        # Each one behind may need a block for its own token.
        if missing > 0 and missing > self.pool.free - behind:
            return []
        if missing > 0:
            seq.blocks += self.pool.allocate(missing)
        return draft

    def _schedule_waiting(self, chunks: list[Chunk], budget: int) -> None:
        while self.waiting and budget > 0 and self._rows:
            seq = self.waiting[0]
            if not self._admit(seq):
                return
            count = min(seq.length - seq.planned, budget)
            chunks.append(_chunk(seq, count))
            budget -= count

    def _admit(self, seq: Sequence) -> bool:
        """Start a sequence if there is room for all its known tokens; return whether it did."""
        # The last token is always computed anew: without it there would be nothing to sample from.
        usable = (len(seq.token_ids) - 1) // self.pool.block_size
        shared = self.pool.find(self._hash(seq, index) for index in range(usable))
        fresh = self.pool.blocks_for(len(seq.token_ids)) - len(shared)
        # A block of growth for each running sequence: admitted without, it would be preempted soon
        # and its prompt computed twice.
        needed = fresh + self.pool.idle_among(shared) + len(self.running)
        if (self.running or self._ended_in_flight) and needed > self.pool.free:
            return False
        self.waiting.pop(0)
        self.waiting_tokens -= len(seq.token_ids)
        self.pool.share(shared)
        seq.blocks = shared + self.pool.allocate(fresh)
        seq.computed = len(shared) * self.pool.block_size
        seq.row = self._rows.pop()
        seq.state = State.RUNNING
        insort(self.running, seq, key=ORDER)
        if not seq.was_scheduled:
            seq.was_scheduled = True
            seq.cached = seq.computed
            self.prefix_queries += seq.prompt_tokens
            self.prefix_hits += seq.cached
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._release(seq)
        self._enqueue(seq)
        self.preemptions += 1

    def _enqueue(self, seq: Sequence) -> None:
        seq.state = State.WAITING
        insort(self.waiting, seq, key=ORDER)
        self.waiting_tokens += len(seq.token_ids)

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        self._rows.append(seq.row)
        seq.blocks, seq.computed, seq.row = [], 0, -1

    def _hash(self, seq: Sequence, index: int) -> bytes:
        size, hashes = self.pool.block_size, seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else seq.parent_hash
            hashes.append(next_hash(parent, seq.token_ids[start : start + size]))
        return hashes[index]

    def _retry_after_s(self) -> float:
        waiting_s = self.waiting_tokens / self.tokens_per_s if self.tokens_per_s else RETRY_MIN_S
        return min(RETRY_MAX_S, max(RETRY_MIN_S, waiting_s))


def _chunk(seq: Sequence, count: int) -> Chunk:
    start = seq.planned
    return Chunk(seq, start, count, samples=start + count == seq.length)
