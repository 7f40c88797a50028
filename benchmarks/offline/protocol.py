"""What a worker and the comparison say to each other: a JSON line with prompts, one with seconds.

Runs in the environments of the peers too, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Job:
    """How a worker runs its model."""

    model: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    dtype: str = "bfloat16"
    quantization: str = "none"

    def to_argument(self) -> str:
        """Return it as a command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_command_line(cls) -> Job:
        """Read the worker's own one."""
        return cls(**json.loads(sys.argv[1]))


# Continues every prompt by so many tokens, all at once, and returns how many came of each.
Generate = Callable[[list[list[int]], int], list[int]]


def answer_batches(load: Callable[[Job], Generate]) -> None:
    """Load the model, say so, and measure one batch after the other until standard input ends."""
    job = Job.from_command_line()
    # Libraries print: the answers get the real standard output, everything else the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    generate = load(job)
    generate([[1, 2, 3, 4]], 2)  # what is compiled or allocated at first use is not measured
    say(ready=True)
    for line in sys.stdin:
        batch = json.loads(line)
        began_at = time.perf_counter()
        counts = generate(batch["prompts"], batch["output_tokens"])
        say(wall_s=time.perf_counter() - began_at, output_tokens=counts)
