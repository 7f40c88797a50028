import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mizzen.runtime.engine.api import SamplingParams
from mizzen.runtime.engine.blocks import BlockPool
from mizzen.runtime.engine.errors import EngineBusyError, PromptTooLongError
from mizzen.runtime.engine.scheduler import Chunk, Limits, Scheduler, tokens_worth
from mizzen.runtime.engine.sequence import Sequence, State

SIZE = 4
GREEDY = SamplingParams(temperature=0)


def make_scheduler(
    *,
    blocks: int = 32,
    step_tokens: int = 16,
    beside_decodes: int = 1000,
    even_context: int | None = None,
    max_running: int = 4,
    model_len: int = 64,
    max_waiting: int = 100,
    max_waiting_tokens: int = 1000,
    draft_tokens: int = 0,
) -> Scheduler:
    pool = BlockPool(num_blocks=blocks + 1, block_size=SIZE)
    return Scheduler(
        pool,
        Limits(
            step_tokens=step_tokens,
            beside_decodes=beside_decodes,
            even_context=even_context,
            max_running=max_running,
            model_len=model_len,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            draft_tokens=draft_tokens,
        ),
    )


class Arrivals:
    """Numbers sequences as they come."""

    def __init__(self) -> None:
        self.count = 0

    def make(self, prompt: int | list[int], *, max_tokens: int = 4, priority: int = 0) -> Sequence:
        self.count += 1
        tokens = (
            [1000 * self.count + i for i in range(prompt)] if isinstance(prompt, int) else prompt
        )
        return Sequence(
            request_id=str(self.count),
            arrival=self.count,
            token_ids=list(tokens),
            sampling=GREEDY,
            priority=priority,
            max_tokens=max_tokens,
        )


def run_step(scheduler: Scheduler) -> list[Chunk]:
    """Do what the engine does, with a model that always says the sequence's length."""
    scheduler.reap()
    chunks = scheduler.schedule()
    sampling = [chunk.seq for chunk in chunks if chunk.samples]
    scheduler.advance(chunks)
    for seq in sampling:
        seq.token_ids.append(len(seq.token_ids))
        if seq.output_tokens >= seq.max_tokens:
            scheduler.finish(seq, "length")
    return chunks


class Driver:
    """Takes steps as the loop does, one ahead if wanted and possible."""

    def __init__(self, scheduler: Scheduler, *, is_ahead: bool) -> None:
        self.scheduler = scheduler
        self.is_ahead = is_ahead
        self.flight: list[Chunk] = []
        self.ends: dict[Sequence, int] = {}  # after so many tokens, which nobody knows before

    def step(self) -> list[Chunk]:
        """Launch a step and land one; return the chunks that were launched."""
        if not (self.is_ahead and self.flight and self.scheduler.may_run_ahead()):
            self._land(self.flight)
            self.flight = []
        self.scheduler.reap()
        before, self.flight = self.flight, self.scheduler.schedule()
        self._land(before)
        return self.flight

    def _land(self, chunks: list[Chunk]) -> None:
        self.scheduler.advance(chunks)
        for chunk in chunks:
            seq = chunk.seq
            if chunk.samples and seq.state is State.RUNNING and not seq.abort_wanted:
                seq.token_ids.append(len(seq.token_ids) % 2)
                if seq.output_tokens >= self.ends.get(seq, seq.max_tokens):
                    self.scheduler.finish(seq, "stop")


def shares(chunks: list[Chunk]) -> dict[str, tuple[int, int]]:
    return {chunk.seq.request_id: (chunk.start, chunk.count) for chunk in chunks}


def test_a_long_prompt_is_cut_to_the_budget_and_decode_goes_on_beside_it() -> None:
    scheduler, arrivals = make_scheduler(step_tokens=16), Arrivals()
    scheduler.add(arrivals.make(4, max_tokens=10))
    run_step(scheduler)
    scheduler.add(arrivals.make(30))
    assert shares(run_step(scheduler)) == {"1": (4, 1), "2": (0, 15)}
    assert shares(run_step(scheduler)) == {"1": (5, 1), "2": (15, 15)}
    assert shares(run_step(scheduler)) == {"1": (6, 1), "2": (30, 1)}


def test_beside_a_decode_a_prompt_gets_few_tokens_and_alone_the_whole_step() -> None:
    scheduler, arrivals = make_scheduler(step_tokens=16, beside_decodes=4), Arrivals()
    first = arrivals.make(30, max_tokens=3)
    scheduler.add(first)
    assert shares(run_step(scheduler)) == {"1": (0, 16)}
    assert shares(run_step(scheduler)) == {"1": (16, 14)}
    scheduler.add(arrivals.make(30))
    assert shares(run_step(scheduler)) == {"1": (30, 1), "2": (0, 4)}
    scheduler.abort(first)
    assert shares(run_step(scheduler)) == {"2": (4, 16)}


@pytest.mark.parametrize(
    ("context", "even_context", "tokens"),
    [(0, 1500, 160), (150, 1500, 145), (1500, 1500, 80), (4000, 1500, 43), (10**6, 1500, 1)],
)
def test_the_longer_the_context_the_fewer_tokens_take_as_long(
    context: int, even_context: int, tokens: int
) -> None:
    assert tokens_worth(160, context=context, even_context=even_context) == tokens


def test_where_attention_costs_nothing_any_context_gets_the_same_tokens() -> None:
    assert tokens_worth(160, context=10**6, even_context=None) == 160


def test_later_pieces_of_a_prompt_are_smaller_beside_a_decode() -> None:
    scheduler = make_scheduler(step_tokens=16, beside_decodes=8, even_context=8)
    arrivals = Arrivals()
    scheduler.add(arrivals.make(2, max_tokens=20))
    run_step(scheduler)
    scheduler.add(arrivals.make(30))
    pieces = [shares(run_step(scheduler)) for _ in range(4)]
    assert [piece["2"] for piece in pieces] == [(0, 8), (8, 4), (12, 3), (15, 2)]
    assert all(piece["1"][1] == 1 for piece in pieces)


@pytest.mark.parametrize(("streams", "prompts", "tokens"), [(1, 1, 4), (2, 2, 20), (1, 3, 49)])
def test_the_more_prompts_wait_for_each_stream_the_larger_their_pieces(
    streams: int, prompts: int, tokens: int
) -> None:
    scheduler = make_scheduler(step_tokens=50, beside_decodes=4, max_running=8, model_len=100)
    arrivals = Arrivals()
    for _ in range(streams):
        scheduler.add(arrivals.make(2, max_tokens=20))
    run_step(scheduler)
    for _ in range(prompts):
        scheduler.add(arrivals.make(40, max_tokens=20))
    counts = [count for _, count in shares(run_step(scheduler)).values()]
    assert counts[:streams] == [1] * streams
    assert sum(counts[streams:]) == tokens


def test_prompts_that_no_place_is_left_for_enlarge_nothing() -> None:
    scheduler = make_scheduler(step_tokens=50, beside_decodes=4, max_running=2)
    arrivals = Arrivals()
    scheduler.add(arrivals.make(2, max_tokens=20))
    run_step(scheduler)
    for _ in range(5):
        scheduler.add(arrivals.make(10))
    assert shares(run_step(scheduler)) == {"1": (2, 1), "2": (0, 4)}


def test_a_long_prompt_leaves_a_token_for_each_one_behind_it() -> None:
    scheduler, arrivals = make_scheduler(step_tokens=8), Arrivals()
    scheduler.add(arrivals.make(2, priority=1, max_tokens=10))
    run_step(scheduler)
    scheduler.add(arrivals.make(30, priority=0))
    run_step(scheduler)
    assert [seq.request_id for seq in scheduler.running] == ["2", "1"]
    assert shares(run_step(scheduler)) == {"2": (7, 7), "1": (3, 1)}


def test_a_full_prefix_hit_leaves_one_token_to_compute() -> None:
    scheduler, arrivals = make_scheduler(), Arrivals()
    prompt = list(range(8))
    scheduler.add(arrivals.make(prompt, max_tokens=1))
    run_step(scheduler)
    second = arrivals.make(prompt, max_tokens=1)
    scheduler.add(second)
    assert shares(run_step(scheduler)) == {"2": (4, 4)}
    assert second.cached == 4
    third = arrivals.make([*prompt, 99], max_tokens=1)
    scheduler.add(third)
    assert shares(run_step(scheduler)) == {"3": (8, 1)}
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (25, 12)


def test_equal_prompts_in_one_step_do_not_read_what_is_not_computed_yet() -> None:
    scheduler, arrivals = make_scheduler(), Arrivals()
    for _ in range(2):
        scheduler.add(arrivals.make(list(range(7)), max_tokens=2))
    assert shares(run_step(scheduler)) == {"1": (0, 7), "2": (0, 7)}
    run_step(scheduler)
    scheduler.check()


def test_the_last_arrived_is_preempted_and_computed_again() -> None:
    scheduler, arrivals = make_scheduler(blocks=5, model_len=20, step_tokens=16), Arrivals()
    first, second = arrivals.make(6, max_tokens=12), arrivals.make(6, max_tokens=4)
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.preemptions == 0:
        run_step(scheduler)
    assert second.state is State.WAITING and second.computed == 0 and second.blocks == []
    assert first.state is State.RUNNING
    while scheduler.has_work():
        run_step(scheduler)
    assert (first.output_tokens, second.output_tokens) == (12, 4)
    scheduler.check()


class Guessing:
    """Guesses as much as it may."""

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        return [7] * count


def test_guesses_take_no_block_that_one_behind_them_needs() -> None:
    scheduler = make_scheduler(blocks=4, model_len=16, draft_tokens=2)
    arrivals = Arrivals()
    guessing, behind = arrivals.make(3, max_tokens=9), arrivals.make(4, max_tokens=9)
    guessing.guesser = Guessing()
    scheduler.add(guessing)
    scheduler.add(behind)
    run_step(scheduler)
    other = scheduler.pool.allocate(1)
    chunks = run_step(scheduler)
    # One block is left, and who comes second needs it for its next token.
    assert [chunk.seq for chunk in chunks] == [guessing, behind]
    assert scheduler.preemptions == 0
    assert chunks[0].draft == []
    scheduler.pool.release(other)


def test_a_lower_priority_value_is_served_first() -> None:
    scheduler, arrivals = make_scheduler(max_running=1), Arrivals()
    scheduler.add(arrivals.make(4, priority=5))
    scheduler.add(arrivals.make(4, priority=-5))
    assert list(shares(run_step(scheduler))) == ["2"]


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers() -> None:
    scheduler = make_scheduler(model_len=64)
    scheduler.add(Arrivals().make(63))
    with pytest.raises(PromptTooLongError, match=r"64 tokens and the context holds 64.*most 63"):
        scheduler.add(Arrivals().make(64))


def test_a_full_queue_says_when_to_come_back() -> None:
    scheduler, arrivals = make_scheduler(max_waiting=2), Arrivals()
    scheduler.add(arrivals.make(20))
    scheduler.add(arrivals.make(20))
    scheduler.tokens_per_s = 10
    with pytest.raises(EngineBusyError, match="2 requests wait") as raised:
        scheduler.add(arrivals.make(4))
    assert raised.value.retry_after_s == 4.0
    run_step(scheduler)
    scheduler.add(arrivals.make(4))


def test_too_many_queued_tokens_are_refused_but_never_the_first_prompt() -> None:
    scheduler, arrivals = make_scheduler(max_waiting_tokens=30), Arrivals()
    scheduler.add(arrivals.make(40))
    with pytest.raises(EngineBusyError, match="40 prompt tokens wait"):
        scheduler.add(arrivals.make(4))


@pytest.mark.parametrize("steps", [0, 1, 2, 8], ids="before {0} steps".format)
def test_abort_frees_everything_in_every_state(steps: int) -> None:
    scheduler, arrivals = make_scheduler(blocks=8, model_len=32, max_running=2), Arrivals()
    seqs = [arrivals.make(10, max_tokens=6) for _ in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    for _ in range(steps):
        run_step(scheduler)
    for seq in [*seqs, *seqs]:
        scheduler.abort(seq)
    scheduler.reap()
    assert not scheduler.has_work()
    assert all(seq.finish_reason in ("abort", "length") for seq in seqs)
    assert scheduler.waiting_tokens == 0
    scheduler.check()


REQUEST = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=31),  # few token values: prefixes are shared
    st.integers(1, 20),  # max_tokens
    st.integers(-1, 1),  # priority
    st.integers(0, 12),  # steps until the next arrival
    st.one_of(st.none(), st.integers(0, 30)),  # step at which it is aborted
    st.integers(1, 20),  # tokens after which it ends by itself
)


@settings(max_examples=300, deadline=None)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=12),
    blocks=st.integers(8, 24),
    step_tokens=st.integers(3, 40),
    beside_decodes=st.integers(1, 40),
    even_context=st.none() | st.integers(1, 40),
    is_ahead=st.booleans(),
)
def test_every_request_ends_no_block_leaks_and_no_limit_is_passed(
    requests: list[tuple[list[int], int, int, int, int | None, int]],
    blocks: int,
    step_tokens: int,
    beside_decodes: int,
    even_context: int | None,
    is_ahead: bool,
) -> None:
    scheduler = make_scheduler(
        blocks=blocks,
        step_tokens=step_tokens,
        beside_decodes=beside_decodes,
        even_context=even_context,
        max_running=3,
        model_len=32,
    )
    arrivals, seqs, step = Arrivals(), [], 0
    driver = Driver(scheduler, is_ahead=is_ahead)
    aborts: dict[int, list[Sequence]] = {}
    due = 0
    pending = list(requests)
    while pending or scheduler.has_work() or driver.flight:
        while pending and due <= step:
            prompt, max_tokens, priority, gap, abort_at, ends_after = pending.pop(0)
            seq = arrivals.make(
                prompt, max_tokens=min(max_tokens, 32 - len(prompt)), priority=priority
            )
            driver.ends[seq] = min(ends_after, seq.max_tokens)
            scheduler.add(seq)
            seqs.append(seq)
            due += gap
            if abort_at is not None:
                aborts.setdefault(step + abort_at, []).append(seq)
        for seq in aborts.get(step, []):
            scheduler.abort(seq)
        chunks = driver.step()
        assert sum(chunk.count for chunk in chunks) <= step_tokens
        assert len({chunk.seq.request_id for chunk in chunks}) == len(chunks)
        assert all(chunk.count > 0 for chunk in chunks)
        assert len(scheduler.running) <= 3
        held = {*scheduler.running, *(chunk.seq for chunk in chunks)}
        assert len({seq.row for seq in held}) == len(held)
        written = {block for chunk in chunks for block in chunk.seq.blocks}
        assert all(scheduler.pool._refs[block] > 0 for block in written)
        scheduler.check()
        step += 1
        assert step < 5000, "a request never ends"
    for seq in seqs:
        assert seq.state is State.FINISHED
        assert seq.finish_reason == "abort" or seq.output_tokens == driver.ends[seq]
    assert scheduler.pool.used == 0
