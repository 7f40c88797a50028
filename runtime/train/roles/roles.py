"""What a policy's step needs besides learning: answers, their worth, and the reference's opinion.

The trainer itself can play all roles, on the policy's own weights. Where they are played by others
(`on_ray.py`), a step comes to the same answers and the same numbers.
"""

# Shapes: N answer tokens.
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.adaptation import load_base
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.generate import draw_answers, drawing_of
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.token_loss import log_probs_by_sample
from mizzen.runtime.train.rewards import Rewards
from mizzen.runtime.train.samples import Floats, Prompt, Sample
from mizzen.runtime.train.surroundings import Surroundings

T = TypeVar("T")
# An answer that may still be under way: asking for it waits.
Pending = Callable[[], T]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers, and how likely whoever drew them found each token, where that is known."""

    token_ids: list[list[int]]
    log_probs: list[Floats] | None = None  # None: the trainer's own numbers are those


class Roles(Protocol):
    """Whoever plays the roles beside the trainer; all raise YieldRequested when asked to stop."""

    def draw(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> Drawn:
        """Return the policy's answer to each prompt, with the weights as they are now."""
        ...

    def judge(
        self, decoder: Decoder, prompts: Sequence[Prompt], answers: Sequence[list[int]]
    ) -> Pending[list[float]]:
        """Return what each answer is worth, once it is known."""
        ...

    def compare(self, decoder: Decoder, samples: Sequence[Sample]) -> Pending[list[Floats]]:
        """Return how likely the reference finds the tokens of each answer, once it is known."""
        ...

    def close(self) -> None:
        """Give back what others keep for the job; nothing is drawn any more."""
        ...


class OwnRoles:
    """The trainer plays them all.

    The reference is the policy with its adapter off; only where every weight moves is a second copy
    of the base kept.
    """

    def __init__(self, around: Surroundings) -> None:
        self._config = around.config
        self._stop = around.stop
        assert around.config.rl is not None, "checked by the job's configuration"
        self._drawing = drawing_of(around.config.rl, around.tokenizer, at_most=around.draw_at_most)
        self._rewards = Rewards(around.config, around.tokenizer, around.device)
        self._reference: Decoder | None = None
        self._at_once = AtOnce(around.config.hyperparameters.micro_batch)

    def draw(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> Drawn:
        """Return the policy's answers."""
        return Drawn(
            draw_answers(decoder, prompts, lora, self._drawing, seed=seed, stop=self._stop)
        )

    def judge(
        self, decoder: Decoder, prompts: Sequence[Prompt], answers: Sequence[list[int]]
    ) -> Pending[list[float]]:
        """Return what computes the rewards."""
        base = partial(self._reference_of, decoder)
        return partial(self._rewards.of, prompts, answers, base=base, group=decoder.group)

    def compare(self, decoder: Decoder, samples: Sequence[Sample]) -> Pending[list[Floats]]:
        """Return what computes the log-probabilities."""
        return lambda: reference_log_probs(
            self._reference_of(decoder), samples, self._config, self._at_once
        )

    def close(self) -> None:
        """Do nothing: nobody else keeps anything."""

    def _reference_of(self, decoder: Decoder) -> Decoder:
        """Return what is never trained: the decoder behind an adapter, else a copy of the base."""
        if self._config.adaptation.type != "full":
            return decoder
        if self._reference is None:
            self._reference = load_base(self._config, decoder.place.device, decoder.group)
        return self._reference


def reference_log_probs(
    reference: Decoder, samples: Sequence[Sample], config: TrainConfig, at_once: AtOnce
) -> list[Floats]:
    """Return the reference's log-probability of each answer's tokens."""
    assert config.rl is not None, "checked by the job's configuration"
    return log_probs_by_sample(
        reference,
        samples,
        None,
        at_once=at_once,
        temperature=config.rl.temperature,
    )
