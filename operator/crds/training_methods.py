"""How a FineTuneJob learns and how its result is examined: the methods and their settings."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, DnsLabel, ModelSource, cel

Method = Annotated[
    Literal["sft", "dpo", "reward", "distill", "merge", "quantize", "prune"],
    Field(
        description="sft learns example answers; dpo learns to prefer one answer to another; "
        "reward trains a model that gives answers a number; distill learns a teacher's "
        "distribution; merge makes one model out of several; quantize stores weights in fewer "
        "bits; prune leaves parts out."
    ),
]
# The settings that only one method has, by that method.
METHOD_SECTIONS = ("dpo", "distill", "merge", "quantize", "prune")
MAKES_ADAPTERS = ("sft", "dpo", "distill")  # that a deployment can answer with
COMPUTED = ("merge", "quantize", "prune")  # from weights that are there: nothing is trained
_NEEDS_SECTION = ("distill", *COMPUTED)
_MEASURED_OTHERWISE = "['dpo', 'reward']"


class Dpo(ApiModel):
    """Direct preference optimization."""

    beta: Annotated[
        float, Field(gt=0, le=100, description="How firmly the model is held near its base.")
    ] = 0.1
    label_smoothing: Annotated[
        float, Field(ge=0, le=0.49, description="Share of the preferences taken to be wrong.")
    ] = 0.0


class Distill(ApiModel):
    """Learning from a teacher."""

    teacher: Annotated[
        ModelSource,
        Field(
            description="The model to learn from: pvc://CLAIM/PATH or file:///PATH. Its tokenizer "
            "must be the base model's."
        ),
    ]
    samples: Annotated[
        int,
        Field(
            ge=1,
            le=1024,
            description="Token ids drawn from the teacher's distribution at each position.",
        ),
    ] = 32
    data_weight: Annotated[
        float, Field(ge=0, le=1, description="Share of the loss that the data's own tokens have.")
    ] = 0.0


class MergePart(ApiModel):
    """One of the things that are merged."""

    source: Annotated[
        ModelSource, Field(description="Adapter or model: pvc://CLAIM/PATH or file:///PATH.")
    ]
    weight: Annotated[float, Field(ge=-1000, le=1000, description="How much it counts.")] = 1.0


class Merge(ApiModel):
    """One model out of several."""

    kind: Annotated[
        Literal["adapter", "delta", "average"],
        Field(
            description="adapter adds LoRA adapters to the base; delta adds weight differences, "
            "as Vicuna's were given out; average takes the weighted mean of base and parts."
        ),
    ]
    parts: Annotated[
        list[MergePart], Field(min_length=1, max_length=16, description="What is merged.")
    ]
    base_weight: Annotated[
        float, Field(ge=0, le=1000, description="How much the base counts in an average.")
    ] = 1.0


class Quantize(ApiModel):
    """Weights in fewer bits."""

    scheme: Annotated[
        Literal["int8", "int4", "fp8"],
        Field(description="int8 and fp8 have a scale per output, int4 one per group of inputs."),
    ]
    group_size: Annotated[
        Literal[32, 64, 128], Field(description="Inputs that share a scale (int4).")
    ] = 128
    algorithm: Annotated[
        Literal["rtn", "gptq"],
        Field(
            description="rtn rounds to the nearest; gptq also makes up for what rounding spoils, "
            "by the dataset's examples."
        ),
    ] = "rtn"
    calibration_samples: Annotated[
        int, Field(ge=1, le=4096, description="Examples that gptq looks at.")
    ] = 64


class Prune(ApiModel):
    """Parts left out."""

    kind: Annotated[
        Literal["depth", "width", "heads", "nm24"],
        Field(
            description="depth leaves out layers, width hidden units, heads KV heads with their "
            "query heads; nm24 sets two of each four weights to zero, which ruins small models "
            "and which no current engine makes faster."
        ),
    ]
    ratio: Annotated[
        float, Field(gt=0, lt=1, description="Share that is left out (not nm24: always half).")
    ] = 0.25
    calibration_samples: Annotated[
        int, Field(ge=1, le=4096, description="Examples that show what is used least.")
    ] = 64


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
        *(
            cel(f"self.method != '{name}' || has(self.{name})", f"Method {name} needs spec.{name}.")
            for name in _NEEDS_SECTION
        ),
        cel(
            "!has(self.promotion) || self.promotion.strategy == 'None' || "
            f"self.method in {list(MAKES_ADAPTERS)}",
            f"promotion.strategy HotLoadAdapter needs a method that makes an adapter which "
            f"answers: {', '.join(MAKES_ADAPTERS)}. Leave promotion out, or set its strategy to "
            "None.",
        ),
        cel(
            f"has(self.dataset) && self.dataset.size() > 0 || self.method in {list(COMPUTED)}",
            "dataset must name at least one source: this method learns from examples.",
        ),
        cel(
            "has(self.dataset) && self.dataset.size() > 0 || !has(self.evaluation) || "
            "self.evaluation.suites.size() == 0",
            "evaluation.suites needs a dataset to measure on.",
        ),
        cel(
            "has(self.dataset) && self.dataset.size() > 0 || "
            "!((has(self.quantize) && self.quantize.algorithm == 'gptq') || "
            "(has(self.prune) && self.prune.kind != 'nm24'))",
            "gptq, and prune of depth, width and heads, need a dataset to see what is used.",
        ),
    )
