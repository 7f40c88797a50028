"""The methods by the names of `spec.method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mizzen.runtime.train.methods.distill import Distill
from mizzen.runtime.train.methods.distill_on_policy import OnPolicyDistill
from mizzen.runtime.train.methods.distill_sequence import SequenceDistill
from mizzen.runtime.train.methods.dpo import Dpo
from mizzen.runtime.train.methods.grpo import Grpo
from mizzen.runtime.train.methods.method import Method
from mizzen.runtime.train.methods.ppo import Ppo
from mizzen.runtime.train.methods.reward import Reward
from mizzen.runtime.train.methods.sft import Sft
from mizzen.runtime.train.surroundings import Surroundings


def _distill(around: Surroundings) -> Method:
    rules = around.config.distill
    if rules is not None and rules.teacher_answers:
        return SequenceDistill(around)
    return OnPolicyDistill(around) if rules and rules.on_policy else Distill(around)


_BUILDERS: Mapping[str, Callable[[Surroundings], Method]] = {
    "sft": lambda _: Sft(),
    "dpo": Dpo,
    "reward": Reward,
    "distill": _distill,
    "grpo": Grpo,
    "ppo": Ppo,
}


def build_method(around: Surroundings) -> Method:
    """Return the job's method."""
    return _BUILDERS[around.config.method](around)
