"""A sequence: one request inside the engine, with what is known and what is computed of it."""

import enum
from dataclasses import dataclass, field

from mizzen.runtime.engine.api import BACKGROUND_PRIORITY, FinishReason, SamplingParams
from mizzen.runtime.engine.grammar import GrammarState
from mizzen.runtime.engine.speculation import Guesser


class State(enum.Enum):
    """Where a sequence stands. Explicit, because "no output yet" also fits a preempted one."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known, tokens computed, blocks held.

    `computed` chases `len(token_ids)`: a step computes the tokens in between, and samples the
    next one when it reaches the end. Prefill, decode and recomputation are all this one rule.
    It holds one step ahead too, with `planned` chasing `length`: both count what the step in
    flight will have done.
    """

    request_id: str
    arrival: int  # order of arrival; unique
    token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    lora_slot: int = 0
    adapter: str | None = None
    parent_hash: bytes = b""  # of the first block
    max_tokens: int = 0  # of output, never beyond the context
    seed: int = 0
    grammar: GrammarState | None = None
    guesser: Guesser | None = None  # where tokens may be guessed
    needs_tokens: bool = False  # the host must know each token before the next step
    prompt_tokens: int = 0
    computed: int = 0
    computing: int = 0  # tokens in steps in flight
    sampling_now: int = 0  # tokens that these steps will add
    cached: int = 0  # prompt tokens found in the prefix cache when first scheduled
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    row: int = -1  # place in the runner's state table while running
    state: State = State.WAITING
    was_scheduled: bool = False
    abort_wanted: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.token_ids)

    @property
    def output_tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def length(self) -> int:
        """How many tokens there are once the steps in flight have landed."""
        return len(self.token_ids) + self.sampling_now

    @property
    def planned(self) -> int:
        """How many of them are computed by then."""
        return self.computed + self.computing

    @property
    def is_ending(self) -> bool:
        """Whether the token being sampled is its last, whatever it is."""
        last = self.sampling.embed or self.length - self.prompt_tokens >= self.max_tokens
        return self.sampling_now > 0 and last

    @property
    def is_demand(self) -> bool:
        """Whether somebody waits for it: work in the background is nobody's demand."""
        return self.priority < BACKGROUND_PRIORITY

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: lower priority value, then earlier arrival."""
        return (self.priority, self.arrival)
