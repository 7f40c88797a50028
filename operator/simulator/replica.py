"""One replica's engine, step by step: a token budget, chunked prefill, first come first served.

Between two events that concern it, every decode step of a replica is like the one before. So such
steps are computed as one *run* of many, and an arrival cuts the run at the end of the step it
falls into: the result is that of single steps at a fraction of the cost. Keys and values are
reserved for prompt and answer on admission, so nothing is ever preempted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil, inf

from mizzen.operator.simulator.replica_profile import Profile
from mizzen.operator.simulator.traces import PREFIX_BLOCK_TOKENS, Request

ITL_RESOLUTION_S = 1e-4


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way, and when what happened to it."""

    request: Request
    prefill_left: int = 0
    first_token_at: float | None = None
    finished_at: float | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token; infinite without one."""
        if self.first_token_at is None:
            return inf
        return self.first_token_at - self.request.arrival_s

    @property
    def mean_itl_s(self) -> float:
        """Mean gap between two tokens; infinite while unfinished, zero for a single token."""
        if self.finished_at is None or self.first_token_at is None:
            return inf
        return (self.finished_at - self.first_token_at) / max(1, self.request.output_tokens - 1)


class Replica:
    """The engine of one replica; `advance` is to be called at `ends_at`."""

    def __init__(self, number: int, profile: Profile, itl_tokens: Counter[int]) -> None:
        """Tokens are counted in `itl_tokens` by their ITL in units of ITL_RESOLUTION_S."""
        self.number = number
        self.profile = profile
        self.waiting: deque[Flight] = deque()
        self.ends_at: float | None = None  # when the current run of steps is over
        self.kv_reserved = 0
        self.output_tokens = 0  # ever generated here
        self.prefilled_tokens = 0  # prompt tokens ever computed here
        self.prompted_tokens = 0  # prompt tokens ever admitted here, cached ones included
        self.waiting_tokens = 0  # prompt tokens of those waiting
        self._busy_s = 0.0
        self._itl_tokens = itl_tokens
        self._partial: Flight | None = None  # its prompt is computed in part
        self._decoding: list[tuple[int, int, Flight]] = []  # (step of the last token, tie, who)
        self._step = 0
        self._kv_used = 0
        self._began_at = 0.0
        self._step_s = 0.0
        self._run_steps = 0
        self._prefilled: list[Flight] = []  # get their first token when this run ends
        self._run_prompt_tokens = 0
        self._turn = 0
        self._prefixes: OrderedDict[int, None] = OrderedDict()

    @property
    def running(self) -> int:
        """Sequences that hold keys and values."""
        return len(self._decoding) + len(self._prefilled) + (self._partial is not None)

    @property
    def in_flight(self) -> int:
        """Requests here, waiting ones included."""
        return self.running + len(self.waiting)

    def kv_used(self, now: float) -> int:
        """Return how many tokens' keys and values are held."""
        return self._kv_used + len(self._decoding) * self._steps_done(now)

    def output_tokens_by(self, now: float) -> int:
        """Return how many tokens were generated so far."""
        return self.output_tokens + len(self._decoding) * self._steps_done(now)

    def steps_by(self, now: float) -> int:
        """Return how many steps were computed so far."""
        return self._step + self._steps_done(now)

    def step_seconds_by(self, now: float) -> float:
        """Return how long all steps took so far."""
        return self._busy_s + self._steps_done(now) * self._step_s

    def submit(self, flight: Flight, now: float) -> None:
        """Take one more request; may change `ends_at`."""
        self.waiting.append(flight)
        self.waiting_tokens += flight.request.prompt_tokens
        if self.ends_at is None:
            self._plan(now)
        elif self._run_steps > 1 and self._has_room(flight.request):
            self._cut(now)

    def advance(self) -> tuple[list[Flight], list[Flight]]:
        """End the current run and begin the next.

        Returns:
            The requests that got their first token, and those that got their last.
        """
        assert self.ends_at is not None
        now = self.ends_at
        first_tokens = self._prefilled
        finished = self._end(now)
        self._plan(now)
        return first_tokens, finished

    def _steps_done(self, now: float) -> int:
        if self.ends_at is None or self._step_s <= 0:
            return 0
        return min(self._run_steps, int((now - self._began_at) / self._step_s))

    def _has_room(self, request: Request) -> bool:
        need = request.prompt_tokens + request.output_tokens
        return (
            self.running < self.profile.max_sequences
            and self.kv_reserved + need <= self.profile.kv_tokens
        )

    def _cut(self, now: float) -> None:
        steps = max(1, ceil((now - self._began_at) / self._step_s - 1e-9))
        if steps < self._run_steps:
            self._run_steps = steps
            self.ends_at = self._began_at + steps * self._step_s

    def _plan(self, now: float) -> None:
        profile = self.profile
        decoding = len(self._decoding)
        prompt_tokens = self._take_prompts(profile.budget_tokens - decoding)
        if prompt_tokens:
            self._run_steps = 1
        elif decoding:
            self._run_steps = self._decoding[0][0] - self._step
        else:
            self.ends_at = None
            return
        self._run_prompt_tokens = prompt_tokens
        self._step_s = (
            profile.step_s
            + profile.step_per_sequence_s * decoding
            + profile.step_per_prompt_token_s * prompt_tokens
        )
        self._began_at = now
        self.ends_at = now + self._run_steps * self._step_s

    def _take_prompts(self, budget: int) -> int:
        """Choose the prompt tokens of the next step and return how many."""
        taken = 0
        while taken < budget:
            flight = self._partial or self._admit()
            if flight is None:
                break
            chunk = min(flight.prefill_left, budget - taken)
            flight.prefill_left -= chunk
            taken += chunk
            self._partial = flight if flight.prefill_left else None
            if self._partial is None:
                self._prefilled.append(flight)
        return taken

    def _admit(self) -> Flight | None:
        if not self.waiting or not self._has_room(self.waiting[0].request):
            return None
        flight = self.waiting.popleft()
        request = flight.request
        self.waiting_tokens -= request.prompt_tokens
        self.prompted_tokens += request.prompt_tokens
        self.kv_reserved += request.prompt_tokens + request.output_tokens
        hit = self._prefix_hit(request)
        self._kv_used += hit
        # The last token of a prompt is always computed: the first answer token comes from it.
        flight.prefill_left = request.prompt_tokens - hit
        return flight

    def _prefix_hit(self, request: Request) -> int:
        """Return how many prompt tokens are cached, and cache this prompt; least used goes."""
        if not request.prefix_ids:
            return 0
        hits = 0
        for prefix in request.prefix_ids:
            if prefix not in self._prefixes:
                break
            hits += 1
        for prefix in request.prefix_ids:
            self._prefixes[prefix] = None
            self._prefixes.move_to_end(prefix)
        while len(self._prefixes) > self.profile.kv_tokens // PREFIX_BLOCK_TOKENS:
            self._prefixes.popitem(last=False)
        return min(hits * PREFIX_BLOCK_TOKENS, request.prompt_tokens - 1)

    def _end(self, now: float) -> list[Flight]:
        steps, decoding = self._run_steps, len(self._decoding)
        self._busy_s += now - self._began_at
        self._step += steps
        if decoding:
            self._itl_tokens[round(self._step_s / ITL_RESOLUTION_S)] += decoding * steps
        self.output_tokens += decoding * steps + len(self._prefilled)
        self.prefilled_tokens += self._run_prompt_tokens
        self._kv_used += decoding * steps + self._run_prompt_tokens + len(self._prefilled)
        for flight in self._prefilled:
            flight.first_token_at = now
            self._turn += 1
            last_step = self._step + flight.request.output_tokens - 1
            heappush(self._decoding, (last_step, self._turn, flight))
        self._prefilled = []
        finished = []
        while self._decoding and self._decoding[0][0] <= self._step:
            flight = heappop(self._decoding)[2]
            flight.finished_at = now
            size = flight.request.prompt_tokens + flight.request.output_tokens
            self.kv_reserved -= size
            self._kv_used -= size
            finished.append(flight)
        return finished
