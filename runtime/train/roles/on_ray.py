"""The roles played by Ray actors; the trainer stays the one that steps, commits and stops.

Actors hold nothing that a restart would miss. So a trainer that is asked to stop waits for none of
them, and one of them that is lost ends the generation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from mizzen.runtime.errors import MizzenError, RankLostError
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.train.errors import RoleLostError, TrainerHangsError
from mizzen.runtime.train.generate import AT_ONCE
from mizzen.runtime.train.roles.actors import (
    ReferenceRole,
    RewardRole,
    RolloutRole,
    Seat,
    choose_device_of,
    cut_weights,
    moving_weights,
)
from mizzen.runtime.train.roles.roles import Drawn, Pending
from mizzen.runtime.train.samples import Floats, Prompt, Sample
from mizzen.runtime.train.surroundings import Stage, Surroundings

log = logging.getLogger(__name__)

_LOOK_S = 0.2
_LOST = "A role on Ray in another pod is gone, or that pod is."


class RayRoles:
    """One actor that draws in each place but the trainer's, one that judges, one that compares."""

    def __init__(self, around: Surroundings, stage: Stage) -> None:
        self._stop = around.stop
        self._timeout_s = around.config.failure.hang_timeout_s
        self._is_alone = len(stage.places) == 1
        rollout, reference, reward = (
            Seat(
                config=around.config,
                device=choose_device_of(role, around.device, torch.cuda.device_count()),
                threads=torch.get_num_threads(),
            )
            for role in (RolloutRole, ReferenceRole, RewardRole)
        )
        others = stage.places[1:] or stage.places
        self._rollouts = [_place(RolloutRole, rollout, place) for place in others]
        self._reference = _place(ReferenceRole, reference, others[0])
        self._reward = _place(RewardRole, reward, others[-1])

    def draw(self, decoder: Decoder, prompts: Sequence[Prompt], lora: Any, *, seed: int) -> Drawn:
        """Have the policy's answers drawn, after its weights have been pushed."""
        self._push(decoder, lora)
        asked = [
            self._rollouts[number % len(self._rollouts)].draw.remote(
                prompts[start : start + AT_ONCE], seed + start
            )
            for number, start in enumerate(range(0, len(prompts), AT_ONCE))
        ]
        return Drawn([answer for answers in self._wait(asked) for answer in answers])

    def judge(
        self, decoder: Decoder, prompts: Sequence[Prompt], answers: Sequence[list[int]]
    ) -> Pending[list[float]]:
        """Have the rewards computed; what is returned waits for them."""
        return self._pending(self._reward.of.remote(prompts, answers))

    def compare(self, decoder: Decoder, samples: Sequence[Sample]) -> Pending[list[Floats]]:
        """Have the log-probabilities computed; what is returned waits for them."""
        return self._pending(self._reference.log_probs.remote(samples))

    def close(self) -> None:
        """Do nothing: the processes end with this one."""

    def _push(self, decoder: Decoder, lora: Any) -> None:
        for bucket in cut_weights(moving_weights(decoder, lora)):
            shared = ray.put(bucket)
            self._wait([rollout.take.remote(shared) for rollout in self._rollouts])

    def _pending(self, asked: Any) -> Pending[Any]:
        return lambda: self._wait([asked])[0]

    def _wait(self, asked: Sequence[Any]) -> list[Any]:
        """Return what was asked for.

        Raises:
            YieldRequested: somebody wants the trainer to stop.
            RoleLostError: whoever should answer is gone.
            RankLostError: the same, in another pod.
            TrainerHangsError: no answer came for as long as the job allows.
        """
        ends_at_s = time.monotonic() + self._timeout_s
        left = list(asked)
        while left:
            self._stop.check()
            if time.monotonic() > ends_at_s:
                raise TrainerHangsError(self._timeout_s)
            _, left = ray.wait(left, timeout=_LOOK_S)
        try:
            return list(ray.get(list(asked)))
        except RayTaskError as error:
            if isinstance(error.cause, MizzenError):
                raise error.cause from None
            raise
        except RayActorError as error:
            log.error("%s", error)
            raise RoleLostError if self._is_alone else RankLostError(_LOST) from None


def _place(role: type, seat: Seat, place: str) -> Any:
    """Start a role in a pod; it reads its models while the trainer reads its own."""
    return ray.remote(role).options(num_cpus=0, resources={place: 1}).remote(seat)
