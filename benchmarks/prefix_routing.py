"""Prefix hit rate of the gateway's routing over simulated replicas, beside other policies.

    python -m benchmarks.prefix_routing [--replicas 4] [--gateways 2] [--conversations 3000]

Multi-turn conversations under a few system prompts arrive at random; every request goes through one
of several gateways that share nothing. The routing is the gateway's own code (affinity key and
balancer), the replicas are simulated: a least-recently-used cache of 16-token blocks each, and a
time to answer that grows with the tokens missed. A policy's hit rate is the share of prompt tokens
found in the chosen replica's cache. The best possible is that of one cache as large as those of all
replicas together, which no placement can beat. `busiest` is the most requests one replica had at
once, over the mean of its peers' peaks.

Printed for caches that hold everything, and for caches that hold a part of it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count

from mizzen.runtime.gateway.affinity import affinity_key
from mizzen.runtime.gateway.balancer import Balancer
from mizzen.runtime.gateway.directory import Endpoint

_BLOCK_TOKENS = 16
_PREFILL_TOKENS_PER_S = 8000.0
_S_PER_TOKEN = 0.02
_THINK_S = 12.0
_ROOM = {"ample": 1_000_000, "tight": 3_000}

Block = tuple[str, int, int]


@dataclass
class Conversation:
    """A client's dialogue: its blocks so far and the turns it still wants."""

    number: int
    system: int
    system_blocks: int
    turns: list[tuple[int, int]]  # new prompt tokens and answer tokens
    own_blocks: int = 0

    def prompt(self, new_tokens: int) -> list[Block]:
        self.own_blocks += -(-new_tokens // _BLOCK_TOKENS)
        shared = [("system", self.system, n) for n in range(self.system_blocks)]
        return shared + [("own", self.number, n) for n in range(self.own_blocks)]

    def key(self) -> int | None:
        messages = [
            {"role": "system", "content": f"You are assistant {self.system}. " * 20},
            {"role": "user", "content": f"question {self.number}"},
        ]
        return affinity_key({"messages": messages}, model="m")


@dataclass
class Cache:
    """Least recently used blocks of one replica."""

    room: int
    blocks: OrderedDict[Block, None] = field(default_factory=OrderedDict)

    def hits(self, prompt: Sequence[Block]) -> int:
        """Count the leading blocks that are here, and keep the whole prompt from now on."""
        found = next((n for n, b in enumerate(prompt) if b not in self.blocks), len(prompt))
        # A prompt's end goes first when room is short: without its beginning it is of no use.
        for block in reversed(prompt):
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > self.room:
            self.blocks.popitem(last=False)
        return found


Choose = Callable[[Conversation, Balancer], Endpoint]


def conversations(total: int, seed: int) -> Iterator[Conversation]:
    """Draw dialogues: system prompts of unequal fame, about five turns each."""
    rng = random.Random(seed)
    systems = [rng.randint(10, 120) for _ in range(8)]
    weights = [1 / (n + 1) for n in range(len(systems))]
    for number in range(total):
        system = rng.choices(range(len(systems)), weights)[0]
        turns = 1 + min(20, int(rng.expovariate(1 / 4.5)))
        sizes = [(rng.randint(20, 400), rng.randint(40, 300)) for _ in range(turns)]
        yield Conversation(number, system, systems[system], sizes)


def simulate(
    choose: Choose, *, replicas: int, gateways: int, total: int, rate: float, room: int, seed: int
) -> dict[str, float]:
    """Return the hit rate and the busiest replica's peak over the mean peak."""
    rng = random.Random(seed + 1)
    caches = [Cache(room) for _ in range(replicas)]
    fleet = [Balancer(eject_s=5) for _ in range(gateways)]
    order, now = count(), 0.0
    events: list[tuple[float, int, Conversation, ExitStack | None]] = []
    for conversation in conversations(total, seed):
        now += rng.expovariate(rate)
        heapq.heappush(events, (now, next(order), conversation, None))
    asked = hit = 0
    running: Counter[int] = Counter()
    peaks: Counter[int] = Counter()
    while events:
        now, _, conversation, finished = heapq.heappop(events)
        if finished is not None:
            finished.close()
            if conversation.turns:
                later = now + rng.expovariate(1 / _THINK_S)
                heapq.heappush(events, (later, next(order), conversation, None))
            continue
        new_tokens, answer_tokens = conversation.turns.pop(0)
        prompt = conversation.prompt(new_tokens)
        gateway = rng.choice(fleet)
        url = choose(conversation, gateway).url
        place = int(url)
        found = caches[place].hits(prompt)
        asked, hit = asked + len(prompt), hit + found
        lease = ExitStack()
        lease.enter_context(gateway.lease(url))
        running[place] += 1
        lease.callback(running.subtract, {place: 1})
        peaks[place] = max(peaks[place], running[place])
        conversation.own_blocks += answer_tokens // _BLOCK_TOKENS
        missed_tokens = (len(prompt) - found) * _BLOCK_TOKENS
        takes_s = missed_tokens / _PREFILL_TOKENS_PER_S + answer_tokens * _S_PER_TOKEN
        heapq.heappush(events, (now + takes_s, next(order), conversation, lease))
    return {
        "hit_rate": hit / asked,
        "busiest": max(peaks.values()) * len(peaks) / sum(peaks.values()),
    }


def policies(replicas: int, seed: int) -> dict[str, Choose]:
    """Return the policies compared, the gateway's first."""
    endpoints = [Endpoint(str(n)) for n in range(replicas)]
    rng, turn = random.Random(seed + 2), count()

    def found(endpoint: Endpoint | None) -> Endpoint:
        assert endpoint is not None
        return endpoint

    return {
        "mizzen": lambda c, balancer: found(balancer.choose(endpoints, key=c.key())),
        "random": lambda c, balancer: rng.choice(endpoints),
        "round robin": lambda c, balancer: endpoints[next(turn) % replicas],
        "least loaded": lambda c, balancer: found(balancer.choose(endpoints)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=2.0, help="new conversations per second")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    common = {"total": args.conversations, "rate": args.rate, "seed": args.seed}
    for label, room in _ROOM.items():
        pooled = {**common, "replicas": 1, "gateways": 1, "room": room * args.replicas}
        best = simulate(lambda c, b: Endpoint("0"), **pooled)["hit_rate"]
        result: dict[str, object] = {"cache": label, "best_possible": round(best, 4)}
        spread = {**common, "replicas": args.replicas, "gateways": args.gateways, "room": room}
        for name, choose in policies(args.replicas, args.seed).items():
            seen = simulate(choose, **spread)
            result[name] = {
                "hit_rate": round(seen["hit_rate"], 4),
                "of_best": round(seen["hit_rate"] / best, 3),
                "busiest": round(seen["busiest"], 2),
            }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
