"""What a method can be told beyond what all methods share; one section of job.json for each."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A section of job.json: unknown fields are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dpo(Part):
    """`beta` holds the model near its base; `label_smoothing` is the share of wrong votes."""

    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
