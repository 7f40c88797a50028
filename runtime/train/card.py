"""A model card: what somebody who finds the artifact needs to know to trust or repeat it.

Its front matter is what model hubs read. It holds no time and no host, so that two runs that made
the same weights make the same card. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.progress import Verdict

CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a result was made from."""

    base_digest: str
    base_weights: str  # their mark: what a server can tell them apart by
    data_digest: str | None  # None where no data was read
    counts: Mapping[str, int]  # of samples


def build_card(
    config: TrainConfig, made_from: Provenance, *, step: int, verdicts: Sequence[Verdict]
) -> str:
    """Return the card as Markdown with a YAML front matter."""
    is_adapter = config.output.kind == "adapter"
    front: dict[str, Any] = {
        "base_model": str(config.base_model),
        "base_model_digest": f"sha256:{made_from.base_digest}",
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mizzen", config.method, *([config.adaptation.type] if config.is_trained else [])],
    }
    if made_from.data_digest is not None:
        front["datasets"] = [dataset.name for dataset in config.datasets]
        front["data_digest"] = f"sha256:{made_from.data_digest}"
    front |= {"seed": config.hyperparameters.seed, "steps": step}
    front["evaluation"] = [
        {
            "suite": verdict.suite,
            "base": verdict.base,
            "result": verdict.candidate,
            "samples": verdict.samples,
            "passed": verdict.passed,
        }
        for verdict in verdicts
    ]
    settings = config.model_dump(mode="json", exclude_none=True, include=_told(config))
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            f"# {config.job}",
            "",
            f"The {config.output.kind} that the FineTuneJob {config.job} made from "
            f"`{config.base_model}` by method {config.method}.",
            "",
            *_scores(verdicts),
            *_samples(made_from.counts),
            "## Settings",
            "",
            "```yaml",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )


def _told(config: TrainConfig) -> set[str]:
    """Return the sections of the job that made a difference."""
    of_training = {"processing", "hyperparameters", "adaptation"} if config.is_trained else set()
    of_another = {"backend"} if config.backend != "Mizzen" else set()
    return {"method", config.section, *of_training, *of_another}


def _scores(verdicts: Sequence[Verdict]) -> list[str]:
    if not verdicts:
        return ["No suite has measured it.", ""]
    rows = [
        f"| {v.suite} | {v.base:.4g} | {v.candidate:.4g} | {v.samples} | "
        f"{'passed' if v.passed else 'failed'} |"
        for v in verdicts
    ]
    head = ["| suite | base | result | samples | verdict |", "|---|---|---|---|---|"]
    return ["## Scores", "", *head, *rows, ""]


def _samples(counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    return ["## Data", "", f"{said}.", ""]
