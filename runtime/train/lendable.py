"""Which jobs can run on the weights of a replica that serves, and what they may touch there.

Must not import torch: the server's process asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from mizzen.runtime.train.config import TrainConfig, first_faults
from mizzen.runtime.train.errors import JobConfigError


def read_loan(document: str) -> TrainConfig:
    """Return the job that a job.json describes.

    Raises:
        JobConfigError: it is no job, or none that can run on lent weights.
    """
    try:
        config = TrainConfig.model_validate_json(document)
    except ValidationError as error:
        raise JobConfigError(f"The loan is not a valid job: {first_faults(error)}.") from error
    for wrong, right in _obstacles(config):
        raise JobConfigError(f"A loan cannot run {wrong}: {right}, or leave mode: Loan out.")
    return config


def _obstacles(config: TrainConfig) -> Iterator[tuple[str, str]]:
    if config.method != "sft" or config.backend != "Mizzen":
        yield f"method {config.method} of backend {config.backend}", "take sft of Mizzen"
    if config.adaptation.type != "lora":
        yield f"adaptation {config.adaptation.type}", "take lora"
    if config.workers > 1:
        yield f"on {config.workers} workers", "set workers to 1"
    if config.evaluation.judge is not None:
        yield "a suite with a judge", "take other suites"
    if config.output.s3 is not None:
        yield "uploads", "leave output.s3 out"


def check_places(config: TrainConfig, roots: Sequence[Path]) -> None:
    """Raise JobConfigError unless all that the job reads and writes lies below these folders."""
    output = config.output
    places = [config.checkpoint.directory, output.directory, output.oci_layout]
    places += [place for data in config.datasets for place in (data.path, data.feedback)]
    for place in filter(None, places):
        real = place.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in roots):
            allowed = ", ".join(map(str, roots))
            raise JobConfigError(
                f"{place} is not below {allowed}, where a replica may read and write for a loan. "
                "Put data and results on the claim of the model."
            )
