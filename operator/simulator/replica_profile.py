"""What one replica can do and how long it takes to start: the numbers a simulation rests on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from math import exp, log

_P90 = 1.2815515655446004  # of the standard normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """A log-normal time, as that from the decision to the first request served."""

    median_s: float = 90.0
    p90_s: float = 110.0

    def draw_s(self, *, seed: int, replica: int) -> float:
        """Return the start-up of the replica of this number, the same under every policy."""
        return self.sample_s(random.Random(f"{seed}/{replica}"))

    def sample_s(self, chance: random.Random) -> float:
        """Return one duration."""
        if self.median_s <= 0:
            return 0.0
        sigma = log(max(self.p90_s, self.median_s) / self.median_s) / _P90
        return self.median_s * exp(chance.gauss(0.0, sigma))


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One replica: a step with n sequences and p prompt tokens takes a + b*n + c*p seconds.

    The default is Llama-2-70B on four H100 of 80 GB, its times fitted from the measurements that
    splitwise-sim publishes (`data/perf_model.csv`, Patel et al., 2024); its keys and values take
    320 KiB a token and find 4 * 80 GB * 0.9 less 138 GB of weights.
    """

    step_s: float = 0.0285  # a
    step_per_sequence_s: float = 0.00033  # b
    step_per_prompt_token_s: float = 0.000105  # c
    kv_tokens: int = 450_000
    max_sequences: int = 256
    budget_tokens: int = 2048  # most tokens computed in one step
    gpus: int = 4
    start_up: StartUp = field(default_factory=StartUp)

    def decode_step_s(self, sequences: int) -> float:
        """Return how long a step without prompt tokens takes."""
        return self.step_s + self.step_per_sequence_s * sequences
