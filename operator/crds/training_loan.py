"""Where a job trains: in pods of its own, or on the weights that a replica serves with."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import cel

Mode = Annotated[
    Literal["Pod", "Loan"],
    Field(
        description="Pod trains in pods of its own. Loan trains on the weights that a replica of "
        "baseModel.deployment serves with, while no request wants them."
    ),
]

_IS_IN_PODS = "self.mode == 'Pod'"


def loan_rules() -> tuple[dict[str, str], ...]:
    """Return the rules that keep a loan to what can run beside a model that serves."""
    return (
        cel(
            f"{_IS_IN_PODS} || has(self.baseModel.deployment)",
            "mode Loan needs baseModel.deployment, whose replicas lend their weights.",
        ),
        cel(
            f"{_IS_IN_PODS} || self.method == 'sft' && self.backend == 'Mizzen' && "
            "self.adaptation.type == 'lora'",
            "mode Loan needs method sft, backend Mizzen and adaptation.type lora.",
        ),
        cel(
            f"{_IS_IN_PODS} || self.workers.max == 1 && !has(self.queue) && "
            "!self.spareCapacity.enabled && self.resources.accelerator.resource == 'none' && "
            "!has(self.podTemplatePatch)",
            "mode Loan has no pods: leave out workers, resources, spareCapacity, queue and "
            "podTemplatePatch.",
        ),
        cel(
            f"{_IS_IN_PODS} || !has(self.evaluation) || !has(self.evaluation.judge)",
            "mode Loan cannot ask evaluation.judge: take other suites.",
        ),
        cel(
            f"{_IS_IN_PODS} || !has(self.output) || !has(self.output.s3)",
            "mode Loan has no keys of a bucket: leave output.s3 out.",
        ),
        cel(
            f"{_IS_IN_PODS} || self.dataset.all(d, !has(d.uri) || "
            "!d.uri.startsWith('configMap://'))",
            "mode Loan reads no ConfigMap: put each dataset on the claim of the model.",
        ),
    )
