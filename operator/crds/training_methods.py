"""How a FineTuneJob learns and how its result is examined: the methods and their settings."""

from typing import Annotated, Literal

from pydantic import Field

from mizzen.operator.crds.common import ApiModel, DnsLabel, ModelSource, cel

Method = Annotated[
    Literal["sft", "dpo", "reward", "distill", "merge", "quantize", "prune", "grpo", "ppo"],
    Field(
        description="sft learns answers, dpo preferences, distill a teacher's distribution, grpo "
        "and ppo from rewards; reward trains a judge; merge, quantize and prune compute."
    ),
]
# The settings that only some methods have; all but rl are named after their one method.
METHOD_SECTIONS = ("dpo", "distill", "merge", "quantize", "prune", "rl")
MAKES_ADAPTERS = ("sft", "dpo", "distill", "grpo", "ppo")  # that a deployment can answer with
COMPUTED = ("merge", "quantize", "prune")  # from weights that are there: nothing is trained
_NEED_SECTION = ("distill", *COMPUTED, "rl")


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

    rules = (
        cel(
            "has(self.teacher) != has(self.deployment)",
            "Set one of distill.teacher and distill.deployment.",
        ),
        cel(
            "!(has(self.onPolicy) && self.onPolicy && has(self.dataWeight)) || "
            "self.dataWeight == 0.0",
            "distill.onPolicy learns from no token of the data: leave dataWeight out.",
        ),
        cel(
            "!self.teacherAnswers || has(self.teacher) && !self.onPolicy && self.dataWeight == 0.0",
            "distill.teacherAnswers needs distill.teacher, and neither onPolicy nor dataWeight.",
        ),
    )

    teacher: Annotated[
        ModelSource | None,
        Field(description="Model to learn from, with the base model's tokenizer."),
    ] = None
    deployment: Annotated[
        DnsLabel | None,
        Field(description="Or an LLMDeployment, asked by the gateway in its idle moments."),
    ] = None
    api_key_secret: Annotated[
        DnsLabel | None, Field(description="Secret whose key api-key is the gateway's.")
    ] = None
    on_policy: Annotated[
        bool, Field(description="The student answers the prompts and the teacher scores that.")
    ] = False
    teacher_answers: Annotated[
        bool, Field(description="The teacher answers the prompts, and these texts are learned.")
    ] = False
    max_new_tokens: Annotated[
        int, Field(ge=1, le=8192, description="Longest answer of the student, or the teacher's.")
    ] = 64
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

    source: Annotated[ModelSource, Field(description="Adapter or model.")]
    weight: Annotated[float, Field(ge=-1000, le=1000, description="How much it counts.")] = 1.0


class Merge(ApiModel):
    """One model out of several."""

    kind: Annotated[
        Literal["adapter", "delta", "average"],
        Field(
            description="adapter adds LoRA adapters to the base, delta weight differences; "
            "average takes the weighted mean of base and parts."
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
        Field(description="rtn rounds to the nearest; gptq makes up for it by the examples."),
    ] = "rtn"
    calibration_samples: Annotated[
        int, Field(ge=1, le=4096, description="Examples that gptq looks at.")
    ] = 64


class Prune(ApiModel):
    """Parts left out."""

    kind: Annotated[
        Literal["depth", "width", "heads", "nm24"],
        Field(
            description="depth leaves out layers, width hidden units, heads KV heads; nm24 sets "
            "two of four weights to zero, which ruins small models."
        ),
    ]
    ratio: Annotated[
        float, Field(gt=0, lt=1, description="Share that is left out (not nm24: always half).")
    ] = 0.25
    calibration_samples: Annotated[
        int, Field(ge=1, le=4096, description="Examples that show what is used least.")
    ] = 64


class RewardRule(ApiModel):
    """What an answer is rewarded for: 0 to 1, times its weight."""

    rules = (
        cel(
            "(self.type == 'regex') == has(self.pattern) && "
            "(self.type == 'length') == has(self.tokens)",
            "A regex rule needs a pattern and a length rule needs tokens; no other rule has them.",
        ),
    )

    type: Annotated[
        Literal["regex", "length", "exactAnswer"],
        Field(
            description="The pattern is found; the length is near tokens; it is the row's answer."
        ),
    ]
    pattern: Annotated[
        str | None, Field(max_length=512, description="Regular expression, as Python reads them.")
    ] = None
    tokens: Annotated[
        int | None, Field(ge=1, le=131072, description="Length that is wanted, in tokens.")
    ] = None
    weight: Annotated[float, Field(ge=-1000, le=1000, description="What a full hit gives.")] = 1.0


class Rollout(ApiModel):
    """Who draws a policy's answers in the trainer's stead."""

    deployment: Annotated[
        DnsLabel,
        Field(
            description="An LLMDeployment of this namespace that serves the base model. Its "
            "replicas are given the policy before each step and draw when they have room."
        ),
    ]


class Rl(ApiModel):
    """Learning from rewards for answers of one's own (grpo, ppo)."""

    rules = (
        cel(
            "has(self.rewardModel) || has(self.rewards) && self.rewards.size() > 0",
            "Set rl.rewards, rl.rewardModel or both: something must be rewarded.",
        ),
    )

    rewards: Annotated[
        list[RewardRule] | None,
        Field(max_length=16, description="Rewards by rule; they add up."),
    ] = None
    reward_model: Annotated[
        ModelSource | None,
        Field(description="Result of a reward job; an adapter must be of this job's base model."),
    ] = None
    missing_eos_penalty: Annotated[
        float, Field(ge=0, le=1000, description="Taken from the reward of an answer cut short.")
    ] = 0.0
    max_new_tokens: Annotated[
        int, Field(ge=1, le=32768, description="Longest answer in tokens.")
    ] = 64
    temperature: Annotated[
        float, Field(gt=0, le=10, description="How freely answers are drawn.")
    ] = 1.0
    kl_coef: Annotated[
        float, Field(ge=0, le=10, description="Cost of drifting from the base model.")
    ] = 0.05
    clip_low: Annotated[
        float, Field(gt=0, lt=1, description="How much less likely an update makes a token.")
    ] = 0.2
    clip_high: Annotated[
        float, Field(gt=0, le=10, description="How much likelier an update makes a token.")
    ] = 0.2
    epochs: Annotated[int, Field(ge=1, le=32, description="Updates from the same answers.")] = 1
    group_size: Annotated[
        int, Field(ge=2, le=256, description="Answers to each prompt (grpo).")
    ] = 8
    gamma: Annotated[float, Field(gt=0, le=1, description="Discount of a token (ppo).")] = 1.0
    gae_lambda: Annotated[
        float, Field(ge=0, le=1, description="How far surprises reach back (ppo).")
    ] = 0.95
    value_clip: Annotated[
        float, Field(gt=0, le=100, description="How far an update moves a value (ppo).")
    ] = 0.2
    value_coef: Annotated[
        float, Field(ge=0, le=100, description="Weight of the value's loss (ppo).")
    ] = 0.1
    whiten_rewards: Annotated[
        bool, Field(description="Divide rewards by their deviation (ppo).")
    ] = True
    rollout: Annotated[
        Rollout | None,
        Field(description="Who draws the answers; by default the trainer, or its roles."),
    ] = None


class EvaluationSuite(ApiModel):
    """One test the result must pass."""

    name: Annotated[DnsLabel, Field(description="Name of the suite in status.")]
    type: Annotated[
        Literal[
            "perplexity", "preferenceLoss", "reward", "classification", "exactMatch", "winRate"
        ],
        Field(
            description="What is measured on the held-out examples: the method's own measure "
            "(perplexity, preferenceLoss or reward), or how well questions are answered."
        ),
    ] = "perplexity"
    labels: Annotated[
        list[str] | None,
        Field(
            min_length=2,
            max_length=32,
            description="Answers to tell apart (classification); by default those there are.",
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        Field(ge=1, le=4096, description="Longest answer in tokens (exactMatch, winRate)."),
    ] = 64
    max_regression_ratio: Annotated[
        float,
        Field(
            ge=-1,
            le=10,
            description="How much worse than the base model the result may be: 0.02 allows 2 "
            "percent, -0.05 demands 5 percent better.",
        ),
    ] = 0.0


class Judge(ApiModel):
    """Who compares answers for winRate."""

    deployment: Annotated[
        DnsLabel, Field(description="An LLMDeployment of this namespace, asked by the gateway.")
    ]
    api_key_secret: Annotated[
        DnsLabel | None, Field(description="Secret whose key api-key is the gateway's.")
    ] = None


class Evaluation(ApiModel):
    """The gate between training and publication."""

    on_fail: Annotated[
        Literal["Block", "Warn"],
        Field(description="Block publishes nothing that fails a suite; Warn only says so."),
    ] = "Block"
    judge: Annotated[Judge | None, Field(description="Compares answers for winRate.")] = None
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
        cel("!has(self.dpo) || self.method == 'dpo'", "spec.dpo is only for method dpo."),
        *(
            cel(
                f"has(self.{name}) == ({_has_section(name)})",
                f"Method {_methods_of(name)} needs spec.{name}, and no other method has it.",
            )
            for name in _NEED_SECTION
        ),
        cel(
            "!has(self.evaluation) || self.evaluation.suites.all(s, s.type in "
            "['classification', 'exactMatch', 'winRate'] ? self.method != 'reward' : s.type == "
            "(self.method in ['dpo', 'reward'] ? 'preferenceLoss' : "
            "self.method in ['grpo', 'ppo'] ? 'reward' : 'perplexity'))",
            "evaluation.suites measure preferenceLoss for methods dpo and reward, reward for "
            "grpo and ppo, and perplexity for the others; and answers for all but reward.",
        ),
        cel(
            "!has(self.evaluation) || has(self.evaluation.judge) || "
            "!self.evaluation.suites.exists(s, s.type == 'winRate')",
            "A suite of type winRate needs evaluation.judge.",
        ),
        cel(
            "!has(self.promotion) || self.promotion.strategy == 'None' || "
            f"self.method in {list(MAKES_ADAPTERS)} || "
            f"self.promotion.strategy == 'Canary' && self.method in {list(COMPUTED)}",
            f"promotion needs a method whose result answers ({', '.join(MAKES_ADAPTERS)}), or "
            "strategy Canary.",
        ),
        cel(
            "!has(self.promotion) || self.promotion.strategy != 'Canary' || "
            f"self.adaptation.type == 'full' || self.method in {list(COMPUTED)}",
            "promotion.strategy Canary needs a whole model: adaptation.type full, or method "
            f"{', '.join(COMPUTED)}.",
        ),
        cel(
            f"self.adaptation.type != 'qlora' || !(self.method in {list(COMPUTED)})",
            f"adaptation.type qlora is for methods that train, not for {', '.join(COMPUTED)}.",
        ),
        cel(
            "!has(self.rl) || !has(self.rl.rollout) || "
            "self.adaptation.type != 'full' && self.roles != 'Ray'",
            "rl.rollout needs adaptation.type lora or qlora, and no roles on Ray: replicas draw "
            "the answers, and are given adapters.",
        ),
        cel(
            f"!has(self.budget) || !(self.method in {list(COMPUTED)})",
            f"budget is for methods that train, not for {', '.join(COMPUTED)}.",
        ),
        cel(
            f"has(self.dataset) && self.dataset.size() > 0 || self.method in {list(COMPUTED)}",
            "dataset must name at least one source, since this method learns from examples.",
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


def _has_section(name: str) -> str:
    return "self.method in ['grpo', 'ppo']" if name == "rl" else f"self.method == '{name}'"


def _methods_of(name: str) -> str:
    return "grpo or ppo" if name == "rl" else name
