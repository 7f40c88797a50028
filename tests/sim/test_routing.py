"""The simulated gateway sends requests where the real one would."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from mizzen.operator.simulator.routing import LOAD_FACTOR, affinity_key
from mizzen.operator.simulator.signals import View
from mizzen.operator.simulator.simulation import Setting, simulate
from mizzen.operator.simulator.traces import PREFIX_BLOCK_TOKENS, Request
from mizzen.runtime.gateway.config import GatewayConfig
from tests.fixtures.scripted_policy import Script

TURNS = 6


def test_the_bound_is_the_gateways_default() -> None:
    assert GatewayConfig.model_fields["load_factor"].default == LOAD_FACTOR


def test_prompts_that_begin_alike_belong_together_and_lengths_alone_do_not() -> None:
    turn = Request(0.0, 1600, 50, (7, 8, 9))
    next_turn = replace(turn, prompt_tokens=2100, prefix_ids=(7, 8, 9, 10))
    other = replace(turn, prefix_ids=(7, 11, 12))
    assert affinity_key(turn) == affinity_key(next_turn) != affinity_key(other)
    assert affinity_key(replace(turn, prefix_ids=())) is None


def conversations() -> list[Request]:
    """Return forty conversations at random moments; each turn has one more block of 512 tokens."""
    chance, requests = random.Random(5), []
    for who in range(40):
        begin = chance.uniform(0, 60)
        for turn in range(TURNS):
            blocks = tuple(who * 100 + block for block in range(turn + 3))
            tokens = len(blocks) * PREFIX_BLOCK_TOKENS
            requests.append(Request(begin + 20 * turn, tokens, 40, blocks))
    return sorted(requests, key=lambda request: request.arrival_s)


@dataclass
class Watching(Script):
    """Keeps what the engines have said last."""

    cached_ratio: float = 0.0

    def wanted(self, view: View) -> int:
        if view.last and (prompted := sum(r.prompted_tokens_total for r in view.last.replicas)):
            computed = sum(r.prefilled_tokens_total for r in view.last.replicas)
            self.cached_ratio = 1 - computed / prompted
        return super().wanted(view)


def cached_ratio(replicas: int) -> float:
    watching = Watching({0: replicas})
    simulate(conversations(), watching, Setting(initial_replicas=replicas, max_replicas=replicas))
    return watching.cached_ratio


def test_the_turns_of_a_conversation_find_their_beginning_in_the_cache() -> None:
    assert cached_ratio(4) >= 0.9 * cached_ratio(1) > 0.5
