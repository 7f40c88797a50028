"""How long a key waits after its n-th failure in a row."""

import random
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Exponential pauses per key, with jitter so that failures do not march in step."""

    first_s: float = 1.0
    longest_s: float = 300.0
    jitter_ratio: float = 0.2
    rng: random.Random = field(default_factory=random.Random)

    def delay_s(self, failures: int) -> float:
        """Return the pause after `failures` (1 or more) failures in a row."""
        # 2**30 s is long past any bound; the cap keeps the power from overflowing.
        pause = min(self.longest_s, self.first_s * 2.0 ** min(failures - 1, 30))
        return pause * (1 + self.jitter_ratio * (2 * self.rng.random() - 1))
