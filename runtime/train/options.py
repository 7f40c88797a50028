"""What a method can be told beyond what all methods share; one section of job.json for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A section of job.json: unknown fields are errors, and nothing changes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Dpo(Part):
    """`beta` holds the model near its base; `label_smoothing` is the share of wrong votes."""

    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)


class Distill(Part):
    """`samples` ids are drawn from the teacher at each position; `data_weight` is the data's."""

    teacher: Path
    samples: int = Field(default=32, ge=1, le=1024)
    data_weight: float = Field(default=0.0, ge=0.0, le=1.0)


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
