"""What a method can be told beyond what all methods share; one section of job.json for each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """A section of job.json: unknown fields are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dpo(Part):
    """`beta` holds the model near its base; `label_smoothing` is the share of wrong votes."""

    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)


class ServedModel(Part):
    """A model behind an OpenAI-compatible address: the gateway's, as a rule, or a replica's own."""

    url: str = Field(pattern=r"^https?://")
    model: str = Field(min_length=1)


class Distill(Part):
    """`samples` ids are drawn from the teacher at each position; `data_weight` is the data's.

    `on_policy`: the student answers the data's prompts, and the teacher says how likely it finds
    that. `teacher_answers`: the teacher answers them once, and the student learns these texts.
    """

    teacher: Path | None = None
    served: ServedModel | None = None
    samples: int = Field(default=32, ge=1, le=1024)
    data_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    on_policy: bool = False
    teacher_answers: bool = False
    max_new_tokens: int = Field(default=64, ge=1)  # of an answer that is drawn

    @model_validator(mode="after")
    def _has_one_teacher(self) -> Distill:
        if (self.teacher is None) == (self.served is None):
            raise ValueError("set teacher, a model's path, or served, a deployment's model")
        if self.on_policy and self.data_weight:
            raise ValueError("on_policy learns from no token of the data: leave data_weight out")
        if self.teacher_answers:
            self._check_teacher_answers()
        return self

    def _check_teacher_answers(self) -> None:
        if self.teacher is None:
            raise ValueError("teacher_answers needs teacher, a model's path")
        if self.on_policy:
            raise ValueError("set one of teacher_answers and on_policy")
        if self.data_weight:
            raise ValueError(
                "teacher_answers learns from no token of the data: leave data_weight out"
            )


class MergePart(Part):
    """One of the things that are merged, and how much it counts."""

    source: Path
    weight: float = 1.0


class Merge(Part):
    """Adapters or weight differences added to the base, or models averaged with it."""

    kind: Literal["adapter", "delta", "average"]
    parts: tuple[MergePart, ...] = Field(min_length=1)
    base_weight: float = Field(default=1.0, ge=0.0)  # of the base in an average


class Quantize(Part):
    """Fewer bits per weight; `calibration_samples` only matter to gptq."""

    scheme: Literal["int8", "int4", "fp8"]
    group_size: Literal[32, 64, 128] = 128  # inputs that share a scale, for int4
    algorithm: Literal["rtn", "gptq"] = "rtn"
    calibration_samples: int = Field(default=64, ge=1)


class Prune(Part):
    """Leave out a share of the layers, hidden units or heads, or of each four weights two."""

    kind: Literal["depth", "width", "heads", "nm24"]
    ratio: float = Field(default=0.25, gt=0.0, lt=1.0)
    calibration_samples: int = Field(default=64, ge=1)


class Rule(Part):
    """A reward of 0 to 1, times its weight."""

    type: Literal["regex", "length", "exactAnswer"]
    pattern: str | None = Field(default=None, max_length=512)
    tokens: int | None = Field(default=None, ge=1)
    weight: float = 1.0

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Rule:
        if self.type == "regex":
            if self.pattern is None:
                raise ValueError("a regex rule needs a pattern")
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"{self.pattern!r} is not a regular expression: {error}") from None
        if self.type == "length" and self.tokens is None:
            raise ValueError("a length rule needs tokens, the length that is wanted")
        return self


class Replicas(Part):
    """The replicas of a deployment, by a name that resolves to each of them."""

    url: str = Field(pattern=r"^http://[^/]+$")


class Rl(Part):
    """How answers are drawn and rewarded, and how far a step goes; for grpo and ppo."""

    rewards: tuple[Rule, ...] = ()
    reward_model: Path | None = None
    missing_eos_penalty: float = Field(default=0.0, ge=0.0)
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, gt=0.0)
    kl_coef: float = Field(default=0.05, ge=0.0)
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0)
    epochs: int = Field(default=1, ge=1)  # updates from the same answers
    group_size: int = Field(default=8, ge=2)  # grpo
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)  # ppo, as all that follow
    gae_lambda: float = Field(default=0.95, ge=0.0, le=1.0)
    value_clip: float = Field(default=0.2, gt=0.0)
    value_coef: float = Field(default=0.1, ge=0.0)
    whiten_rewards: bool = True
    rollout: Replicas | None = None  # who draws the answers; None: the trainer or its roles

    @model_validator(mode="after")
    def _rewards_something(self) -> Rl:
        if not self.rewards and self.reward_model is None:
            raise ValueError("set rewards, reward_model or both: something must be rewarded")
        return self
