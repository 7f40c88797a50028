"""How a FineTuneJob learns and how its result is examined: the methods and their settings."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, DnsLabel, cel

Method = Annotated[
    Literal["sft", "dpo", "reward"],
    Field(
        description="sft learns example answers; dpo learns to prefer one answer to another; "
        "reward trains a model that gives answers a number."
    ),
]
# The settings that only one method has, by that method.
METHOD_SECTIONS = ("dpo",)
_MEASURED_OTHERWISE = "['dpo', 'reward']"


class Dpo(ApiModel):
    """Direct preference optimization."""

    beta: Annotated[
        float, Field(gt=0, le=100, description="How firmly the model is held near its base.")
    ] = 0.1
    label_smoothing: Annotated[
        float, Field(ge=0, lt=0.5, description="Share of the preferences taken to be wrong.")
    ] = 0.0


class EvaluationSuite(ApiModel):
    """One test the result must pass."""

    name: Annotated[DnsLabel, Field(description="Name of the suite in status.")]
    type: Annotated[
        Literal["perplexity", "preferenceLoss"],
        Field(
            description="What is measured on the held-out examples, result against base model: "
            "perplexity, or for dpo and reward preferenceLoss."
        ),
    ] = "perplexity"
    max_regression_ratio: Annotated[
        float,
        Field(
            ge=-1,
            le=10,
            description="How much worse than the base model the result may be: 0.02 allows 2 "
            "percent, -0.05 demands 5 percent better.",
        ),
    ] = 0.0


class Evaluation(ApiModel):
    """The gate between training and publication."""

    suites: Annotated[
        list[EvaluationSuite],
        Field(
            max_length=16,
            description="Tests the result must pass before it is promoted.",
            json_schema_extra={
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["name"],
            },
        ),
    ]


def method_rules() -> tuple[dict[str, str], ...]:
    """Return the rules between a method, its settings and what its result is measured by."""
    return (
        *(
            cel(
                f"!has(self.{name}) || self.method == '{name}'",
                f"spec.{name} is only for method {name}.",
            )
            for name in METHOD_SECTIONS
        ),
        cel(
            "!has(self.evaluation) || self.evaluation.suites.all(s, s.type == "
            f"(self.method in {_MEASURED_OTHERWISE} ? 'preferenceLoss' : 'perplexity'))",
            "evaluation.suites need type preferenceLoss for methods dpo and reward, and perplexity "
            "for the others.",
        ),
        cel(
            "self.method != 'reward' || !has(self.promotion) || self.promotion.strategy == 'None'",
            "A reward model answers nobody: leave promotion out, or set its strategy to None.",
        ),
    )
