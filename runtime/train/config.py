"""What a training job is told: the operator writes it as job.json, the trainer reads it here.

Every field of the file has its place in this model, unknown ones are errors, and a dataset is
already a path or a URL: the trainer knows nothing of Kubernetes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.measures import SuiteType
from mizzen.runtime.train.options import Distill, Dpo, Merge, Part, Prune, Quantize, Rl, ServedModel

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Field(pattern=r"^(sha256:)?[0-9a-f]{64}$")]


class Adaptation(Part):
    """Which weights move; rank, alpha, dropout and targets only matter to LoRA.

    `quantization` is how qlora keeps the frozen weights.
    """

    type: Literal["full", "lora", "qlora"] = "lora"
    rank: int = Field(default=16, ge=1, le=512)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    quantization: Literal["int8", "int4"] = "int8"


class Dataset(Part):
    """One file of conversations, or a folder of feedback up to a time.

    `weight` 2.0 shows each sample twice per epoch.
    """

    name: str = Field(min_length=1)
    path: Path | None = None
    url: str | None = Field(default=None, pattern=r"^https?://")
    feedback: Path | None = None
    until: str | None = None
    weight: float = Field(default=1.0, gt=0)
    sha256: Sha256 | None = None
    format: Literal["auto", "messages", "promptCompletion"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if sum(place is not None for place in (self.path, self.url, self.feedback)) != 1:
            raise ValueError("set exactly one of path, url and feedback")
        if self.feedback is not None and self.sha256 is not None:
            raise ValueError("sha256 is for a file: leave it out beside feedback")
        return self


class Processing(Part):
    """How conversations become labelled tokens."""

    loss_on: Literal["assistant", "all"] = "assistant"
    max_seq_len: int = Field(default=1024, ge=8)
    on_overlong: Literal["truncate", "drop"] = "truncate"
    holdout_ratio: float = Field(default=0.1, ge=0.0, lt=1.0)
    format: Literal["auto", "messages", "promptCompletion"] = "auto"
    engine: Literal["Auto", "InProcess", "Ray"] = "Auto"  # what prepares it; not what comes of it


class Hyperparameters(Part):
    """How the weights move. `batch_size` samples make one step, `micro_batch` run at once."""

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    micro_batch: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_ratio: Ratio = 0.03
    weight_decay: float = Field(default=0.0, ge=0)
    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    grad_clip: float = Field(default=1.0, ge=0)  # 0: gradients stay as they are
    seed: int = Field(default=0, ge=0, lt=2**32)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


class Checkpointing(Part):
    """Where and how often a state is committed; whichever of steps and seconds comes first."""

    directory: Path
    every_steps: int | None = Field(default=50, ge=1)
    every_seconds: float | None = Field(default=60.0, gt=0)
    keep_last: int = Field(default=2, ge=1)
    keep_best: int = Field(
        default=0, ge=0
    )  # beside the last; of steps that are due by their number

    def is_step_due(self, step: int) -> bool:
        """Whether the state after this many steps is to be committed, whatever the time."""
        return self.every_steps is not None and step > 0 and step % self.every_steps == 0

    def is_time_up(self, elapsed_s: float) -> bool:
        """Whether the last commit is too long ago."""
        return self.every_seconds is not None and elapsed_s >= self.every_seconds


class Parallelism(Part):
    """How many of the workers share one copy of the model, each with a part of every matrix."""

    tensor: int = Field(default=1, ge=1)


class Budget(Part):
    """What a job may use before it ends with what it has; only the steps count, of all runs."""

    max_hours: float | None = Field(default=None, gt=0)
    max_tokens: int | None = Field(default=None, ge=1)


class Failure(Part):
    """When a process that stands still is ended, so that the next one can go on."""

    hang_timeout_s: float = Field(default=1800.0, gt=0)


class Output(Part):
    """Where the artifact goes: into a folder of its own, named by its digest."""

    directory: Path
    kind: Literal["adapter", "model"] = "adapter"
    oci_layout: Path | None = None  # a copy in the OCI image layout in this folder
    s3: str | None = Field(default=None, pattern=r"^s3://[^/]+/.+")  # a copy in this bucket


class Suite(Part):
    """One question the gate asks; a candidate may be worse than its base by this ratio.

    A negative ratio demands that it is better.
    """

    name: str = Field(min_length=1)
    type: SuiteType = "perplexity"
    max_regression_ratio: float = Field(default=0.0, ge=-1.0)
    labels: tuple[str, ...] = ()  # classification; by default the answers there are
    max_new_tokens: int = Field(default=64, ge=1)  # exactMatch and winRate

    @property
    def is_question(self) -> bool:
        """Whether it asks a model that answers, whatever the method learns from."""
        return self.type in _OF_ANSWERS


class Evaluation(Part):
    """What a result must pass before it is published; no suite, no gate.

    `judge` compares answers for winRate.
    """

    on_fail: Literal["Block", "Warn"] = "Block"
    judge: ServedModel | None = None
    suites: tuple[Suite, ...] = ()


TRANSFORMS = frozenset({"merge", "quantize", "prune"})
_MEASURE_OF: dict[str, SuiteType] = {
    "dpo": "preferenceLoss",
    "reward": "preferenceLoss",
    "grpo": "reward",
    "ppo": "reward",
}
# Asked of any model that answers.
_OF_ANSWERS: frozenset[SuiteType] = frozenset({"classification", "exactMatch", "winRate"})


class TrainConfig(Part):
    """One generation of one job."""

    job: str = Field(min_length=1)
    backend: Literal["Mizzen", "Transformers"] = "Mizzen"
    method: Literal[
        "sft", "dpo", "reward", "distill", "merge", "quantize", "prune", "grpo", "ppo"
    ] = "sft"
    adaptation: Adaptation = Adaptation()
    base_model: Path
    datasets: tuple[Dataset, ...] = ()
    processing: Processing = Processing()
    hyperparameters: Hyperparameters = Hyperparameters()
    dpo: Dpo = Dpo()
    distill: Distill | None = None
    merge: Merge | None = None
    quantize: Quantize | None = None
    prune: Prune | None = None
    rl: Rl | None = None
    budget: Budget = Budget()
    failure: Failure = Failure()
    checkpoint: Checkpointing
    output: Output
    evaluation: Evaluation = Evaluation()
    roles: Literal["Auto", "InProcess", "Ray"] = "InProcess"  # who draws and judges answers
    workers: int = Field(default=1, ge=1)  # pods of this generation
    parallelism: Parallelism = Parallelism()
    generation: int = Field(default=1, ge=0)
    admin_port: int = Field(default=8002, ge=0, le=65535)

    @model_validator(mode="after")
    def _parts_agree(self) -> TrainConfig:
        if getattr(self, self.section, True) is None:
            raise ValueError(f"method {self.method} needs a section {self.section}")
        if self.adaptation.type == "qlora" and not self.is_trained:
            raise ValueError(f"adaptation qlora is for methods that train, not {self.method}")
        if self.budget != Budget() and not self.is_trained:
            raise ValueError(f"a budget is for methods that train, not {self.method}")
        if self.needs_data and not self.datasets:
            raise ValueError(f"method {self.method} needs datasets here")
        if self.evaluation.suites and self.processing.holdout_ratio == 0:
            raise ValueError("evaluation.suites need processing.holdout_ratio above 0")
        self._check_suites()
        self._check_backend()
        if self.checkpoint.keep_best:
            self._check_keep_best()
        if self.roles == "Ray" and self.method not in ("grpo", "ppo"):
            raise ValueError(f"roles Ray are for methods grpo and ppo, not {self.method}")
        if self.rl is not None and self.rl.rollout is not None:
            self._check_rollout()
        if self.workers > 1:
            self._check_workers()
        if self.parallelism.tensor > 1:
            self._check_tensor()
        is_adapter = self.is_trained and self.adaptation.type != "full"
        wanted = "adapter" if is_adapter else "model"
        if self.output.kind != wanted:
            maker = f"adaptation {self.adaptation.type}" if self.is_trained else self.method
            raise ValueError(f"{maker} makes output.kind {wanted}")
        return self

    def _check_rollout(self) -> None:
        if self.adaptation.type == "full":
            raise ValueError(
                "rl.rollout has replicas answer with an adapter: set adaptation.type to lora or "
                "qlora"
            )
        if self.roles == "Ray":
            raise ValueError("rl.rollout has replicas draw the answers: set roles to InProcess")

    def _check_tensor(self) -> None:
        ranks = self.parallelism.tensor
        if self.workers % ranks:
            raise ValueError(f"workers must be a multiple of parallelism.tensor, {ranks}")
        if self.roles == "Ray":
            # The other pods would play roles, each with a whole model.
            raise ValueError("roles Ray need parallelism.tensor 1, or set roles to InProcess")

    def _check_workers(self) -> None:
        if not self.is_trained:
            raise ValueError(f"method {self.method} runs on one worker: set workers to 1")
        if self.rl is not None and self.rl.rollout is not None:
            # Replicas are given one whole adapter by one trainer.
            raise ValueError("rl.rollout runs on one worker: set workers to 1")

    def _check_backend(self) -> None:
        if self.backend == "Mizzen":
            return
        if self.method != "sft":
            raise ValueError(f"backend Transformers runs sft: use Mizzen for {self.method}")
        if self.adaptation.type == "qlora":
            raise ValueError("backend Transformers trains full or lora: use Mizzen for qlora")
        if self.workers > 1 or self.checkpoint.keep_best:
            raise ValueError(
                "backend Transformers runs on one worker and keeps the last checkpoints: use "
                "Mizzen for several workers and for checkpoint.keep_best"
            )

    def _check_keep_best(self) -> None:
        if self.processing.holdout_ratio == 0 or self.checkpoint.every_steps is None:
            raise ValueError(
                "checkpoint.keep_best needs checkpoint.every_steps and processing.holdout_ratio "
                "above 0"
            )

    def _check_suites(self) -> None:
        possible = {_MEASURE_OF.get(self.method, "perplexity")}
        if self.method != "reward":
            possible |= _OF_ANSWERS
        types = {suite.type for suite in self.evaluation.suites}
        if types - possible:
            names = ", ".join(sorted(possible))
            raise ValueError(f"method {self.method} is measured by suites of type {names}")
        if "winRate" in types and self.evaluation.judge is None:
            raise ValueError("a suite of type winRate needs evaluation.judge")

    @property
    def section(self) -> str:
        """The name of the section with the method's own settings, if it has any."""
        return "rl" if self.method in ("grpo", "ppo") else self.method

    @property
    def is_trained(self) -> bool:
        """Whether weights learn, instead of being computed from those that are there."""
        return self.method not in TRANSFORMS

    @property
    def needs_data(self) -> bool:
        """Whether there is nothing to do without samples."""
        if self.is_trained or self.evaluation.suites:
            return True
        if self.quantize is not None and self.method == "quantize":
            return self.quantize.algorithm == "gptq"
        return self.method == "prune" and self.prune is not None and self.prune.kind != "nm24"


class TrainerEnvironment(BaseSettings):
    """What belongs to the process rather than to the job; read from MIZZEN_* variables."""

    model_config = SettingsConfigDict(env_prefix="MIZZEN_")

    admin_token_file: Path = Path("/var/run/mizzen/admin/token")
    termination_log: Path = Path("/dev/termination-log")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    judge_api_key: str | None = None
    teacher_api_key: str | None = None
    # How the workers of a generation find each other, where there are several.
    node_rank: int = Field(default=0, ge=0)
    master_addr: str = "127.0.0.1"
    master_port: int = Field(default=8003, ge=1, le=65535)
    host: str = "0.0.0.0"
    join_seconds: float = Field(default=600.0, gt=0)


def load_config(path: Path) -> TrainConfig:
    """Read and check job.json.

    Raises:
        JobConfigError: the file is missing or does not describe a job.
    """
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise JobConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise JobConfigError(f"{path.name} is not a valid job: {first_faults(error)}.") from error


def first_faults(error: ValidationError, *, limit: int = 5) -> str:
    """Return the first faults as `field: what is wrong`, short enough for a status message."""
    faults = [
        f"{'.'.join(str(part) for part in fault['loc']) or 'job'}: {fault['msg']}"
        for fault in error.errors(include_url=False)
    ]
    hidden = len(faults) - limit
    return "; ".join(faults[:limit]) + (f"; and {hidden} more" if hidden > 0 else "")
