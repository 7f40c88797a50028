"""What runs a FineTuneJob's steps: our own loop, or Hugging Face's Trainer."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import cel

Backend = Annotated[
    Literal["Mizzen", "Transformers"],
    Field(
        description="Mizzen trains with the code that serves; Transformers with Hugging Face's "
        "Trainer, by method sft, also models that Mizzen cannot serve."
    ),
]
_IS_OURS = "self.backend == 'Mizzen'"


def backend_rules() -> tuple[dict[str, str], ...]:
    """Return the rules that keep a job to what its backend can do."""
    return (
        cel(
            f"{_IS_OURS} || self.method == 'sft'",
            "backend Transformers runs method sft alone: all other methods need backend Mizzen.",
        ),
        cel(
            f"{_IS_OURS} || self.adaptation.type != 'qlora'",
            "backend Transformers trains full or lora: adaptation.type qlora needs backend Mizzen.",
        ),
        cel(
            f"{_IS_OURS} || self.workers.max == 1 && self.checkpoint.keepBest == 0",
            "backend Transformers runs on one worker and keeps the last checkpoints: workers.max "
            "above 1 and checkpoint.keepBest need backend Mizzen.",
        ),
    )
