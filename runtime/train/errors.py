"""Everything that can end a training job, each with the reason its status will show.

A `JobError` is the job's own fault and running it again would end the same way; any other
`MizzenError` may pass, so the operator tries again.
"""

from __future__ import annotations

from collections.abc import Sequence

from mizzen.runtime.errors import MizzenError


class JobError(MizzenError):
    """Base of the errors only a changed job, dataset or model can cure (exit 42)."""


class JobConfigError(JobError):
    """job.json is missing or says something impossible."""

    reason = "JobConfigInvalid"


class DatasetError(JobError):
    """Base of what can be wrong with a dataset; every message starts with its name."""

    def __init__(self, dataset: str, what: str) -> None:
        super().__init__(f"dataset {dataset}: {what}")


class DatasetNotFoundError(DatasetError):
    """Nothing is there to read."""

    reason = "DatasetNotFound"


class DatasetEmptyError(DatasetError):
    """The file holds no sample, or none is left to train on."""

    reason = "DatasetEmpty"


class DatasetNotJsonError(DatasetError):
    """A line is not JSON."""

    reason = "DatasetNotJson"


class DatasetFormatUnknownError(DatasetError):
    """A sample has neither of the forms we read."""

    reason = "DatasetFormatUnknown"


class DatasetNoAssistantTurnsError(DatasetError):
    """No token would carry a loss."""

    reason = "DatasetNoAssistantTurns"


class DatasetRefusedByTemplateError(DatasetError):
    """The model's chat template cannot render a sample."""

    reason = "DatasetRefusedByTemplate"


class DatasetNeverStopsError(DatasetError):
    """No labelled token ends a turn: the model would learn never to stop."""

    reason = "DatasetNeverStops"


class DatasetDigestMismatchError(DatasetError):
    """The bytes are not the ones the job was written for, or was started with."""

    reason = "DatasetDigestMismatch"


class DatasetUnreachableError(MizzenError):
    """The server did not answer; it may later."""

    reason = "DatasetUnreachable"

    def __init__(self, dataset: str, what: str) -> None:
        super().__init__(f"dataset {dataset}: {what}")


class TeacherTokenizerError(JobError):
    """The teacher's token ids mean other tokens than the student's."""

    reason = "TeacherTokenizerDiffers"

    def __init__(self, *, student: str, teacher: str) -> None:
        super().__init__(
            f"The teacher's vocabulary has the digest {teacher} and the student's {student}. "
            "Use a teacher with the same tokenizer, or let it write answers and train on them "
            "with method sft."
        )


class JudgeFailedError(JobError):
    """The judge refuses, or what it says is no verdict."""

    reason = "JudgeFailed"

    def __init__(self, model: str, what: str) -> None:
        super().__init__(
            f"The judge {model} {what} Check evaluation.judge: the deployment's name, its API "
            "key, and that it is a chat model."
        )


class JudgeUnreachableError(MizzenError):
    """The judge did not answer; it may later."""

    reason = "JudgeUnreachable"

    def __init__(self, what: str) -> None:
        super().__init__(f"The judge at {what}, also after several attempts.")


class TeacherUnavailableError(MizzenError):
    """The deployment that teaches did not answer; it may later."""

    reason = "TeacherUnavailable"


class TeacherNotFiniteError(JobError):
    """The deployment that teaches overflows on a text, and would do so again."""

    reason = "TeacherNotFinite"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The teacher {model} has no finite numbers for a text of this job. Check that its "
            "weights are whole and its precision the one they were made for, or name another "
            "teacher."
        )


class RolloutRefusedError(JobError):
    """The replicas that should draw the answers will not answer with this policy."""

    reason = "RolloutRefused"

    def __init__(self, what: str) -> None:
        super().__init__(
            f"The deployment of rl.rollout refuses: {what} Change it, name another, or leave "
            "rl.rollout out: the trainer then draws the answers itself."
        )


class RolloutUnavailableError(MizzenError):
    """No replica drew an answer for a long time; one may later."""

    reason = "RolloutUnavailable"

    def __init__(self, where: str, what: str) -> None:
        super().__init__(
            f"No replica at {where} has answered for a long time: {what}. Check that the "
            "deployment of rl.rollout has a ready replica; rollouts wake none."
        )


class LossNotFiniteError(JobError):
    """Training ran away; the same step would run away again."""

    reason = "LossNotFinite"

    def __init__(
        self, step: int, what: str = "the loss or its gradient is not a finite number"
    ) -> None:
        super().__init__(
            f"Training went astray at step {step}: {what}. "
            "Lower hyperparameters.learningRate or raise hyperparameters.warmupRatio."
        )


class MemoryTooSmallError(JobError):
    """Not even one sample's step fits into the device or the host."""

    reason = "MemoryTooSmall"

    def __init__(self) -> None:
        super().__init__(
            "Memory runs out even with one sample at once. Lower processing.maxSeqLen, "
            "maxNewTokens where answers are drawn, or adaptation.rank, or run on a device with "
            "more memory."
        )


class MicroBatchTooLargeError(JobError):
    """A step does not fit, and this backend cannot make it smaller on the way."""

    reason = "MemoryTooSmall"

    def __init__(self, samples: int) -> None:
        super().__init__(
            f"Memory runs out with {samples} samples at once. Lower hyperparameters.microBatch or "
            "processing.maxSeqLen, or run on a device with more memory."
        )


class BackendMissingError(JobError):
    """The image lacks what a backend is made of."""

    reason = "BackendMissing"

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(
            f"Backend Transformers needs {' and '.join(packages)}. Install them with "
            "`pip install 'mizzen[transformers]'`, or use backend Mizzen."
        )


class EngineMissingError(JobError):
    """The image lacks what large data is prepared with."""

    reason = "BackendMissing"

    def __init__(self, packages: Sequence[str]) -> None:
        super().__init__(
            f"processing.engine Ray needs {' and '.join(packages)}. Install them with "
            "`pip install 'mizzen[data]'`, or set processing.engine to Auto or InProcess."
        )


class TrainingDoesNotFitError(JobError):
    """Weights, gradients and the optimizer's moments alone are more than the memory there is."""

    reason = "TrainingDoesNotFit"

    def __init__(
        self, *, weights_mib: int, gradients_mib: int, moments_mib: int, limit_mib: int
    ) -> None:
        total_mib = weights_mib + gradients_mib + moments_mib
        super().__init__(
            f"Training needs {weights_mib} MiB for weights + {gradients_mib} MiB for gradients + "
            f"{moments_mib} MiB for the optimizer = {total_mib} MiB before the first sample, and "
            f"the trainer has {limit_mib} MiB. Use adaptation.type lora or qlora, a smaller base "
            "model, more memory, or more workers for one copy "
            "(parallelism.tensor)."
        )


class ComputingDoesNotFitError(JobError):
    """A base in float32 and what is made of it are more than the host's memory."""

    reason = "TrainingDoesNotFit"

    def __init__(self, *, method: str, weights_mib: int, beside_mib: int, limit_mib: int) -> None:
        super().__init__(
            f"Method {method} needs {weights_mib} MiB for the base model in float32 + {beside_mib} "
            f"MiB for what it makes of it = {weights_mib + beside_mib} MiB of the host's memory, "
            f"on a GPU too, and the trainer has {limit_mib} MiB. Give it more memory "
            "(spec.podTemplatePatch.resources) or use a smaller base model."
        )


class LoanDoesNotFitError(JobError):
    """A step is more than the memory that the replica has left."""

    reason = "TrainingDoesNotFit"

    def __init__(
        self,
        *,
        adapter_bytes: int,
        step_bytes: int,
        tokens: int,
        spare_bytes: int,
        limit_bytes: int,
    ) -> None:
        adapter_mib, step_mib = -(-adapter_bytes // 2**20), -(-step_bytes // 2**20)
        super().__init__(
            f"The loan needs {adapter_mib} MiB for its adapter with gradients and optimizer + "
            f"{step_mib} MiB for a step with one sample of {tokens} tokens = "
            f"{adapter_mib + step_mib} MiB, and of the replica's {limit_bytes >> 20} MiB its "
            f"weights, KV cache and own steps leave {spare_bytes >> 20}. Lower "
            "processing.maxSeqLen or adaptation.rank, give the deployment's replicas more memory "
            "or a smaller KV cache, or leave mode: Loan out."
        )


class TrainerHangsError(MizzenError):
    """No micro-batch ended for a long time; a new process may fare better."""

    reason = "TrainerHangs"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(
            f"No micro-batch ended for {timeout_s:g} s, so the trainer was ended; its log shows "
            "where it stood. Raise failure.hangTimeoutSeconds if its steps are that long."
        )


class RoleLostError(MizzenError):
    """A process that drew answers, judged them or knew the reference is gone."""

    reason = "RoleLost"

    def __init__(self) -> None:
        super().__init__(
            "A role on Ray is gone, most often because its memory was not enough: each holds a "
            "copy of the base model. Give the trainer more memory, or set spec.roles to InProcess."
        )


class PreparationLostError(MizzenError):
    """A process that read data is gone."""

    reason = "PreparationLost"

    def __init__(self) -> None:
        super().__init__(
            "A process that prepared data on Ray is gone, most often because its memory was not "
            "enough: each is allowed 1 GiB. Give the trainer more memory or fewer CPUs."
        )


class CheckpointMismatchError(JobError):
    """The committed checkpoint belongs to a different job."""

    reason = "CheckpointMismatch"


class TensorsDifferError(CheckpointMismatchError):
    """Its tensors have other names or shapes."""

    def __init__(self) -> None:
        super().__init__(
            "The checkpoint's tensors are not those of this base model and adaptation. "
            "Restore the base model, or give the job a new name to start afresh."
        )


class CheckpointDamagedError(MizzenError):
    """What was committed a moment ago cannot be read; the one before it may be intact."""

    reason = "CheckpointDamaged"

    def __init__(self, path: object) -> None:
        super().__init__(
            f"The result cannot be read from {path}: its files are damaged. The next run goes on "
            "from the checkpoint before it; check the volume if this comes again."
        )


class BaseModelChangedError(JobError):
    """The committed checkpoint was trained beside other weights than those that are there now."""

    reason = "BaseModelChanged"


class StorageFullError(MizzenError):
    """There is no room for a checkpoint or an artifact; room can be made while we wait."""

    reason = "StorageFull"

    def __init__(self, what: str, *, directory: object, need_mib: int | None = None) -> None:
        room = f" It needs {need_mib} MiB." if need_mib else ""
        super().__init__(
            f"{what} cannot be written to {directory}: the volume is full.{room} "
            "Enlarge the claim or delete what is no longer needed."
        )


class UploadRefusedError(JobError):
    """The bucket is not there, or not for us."""

    reason = "UploadRefused"

    def __init__(self, address: str, what: str) -> None:
        super().__init__(
            f"The artifact cannot be copied to {address}: {what}. Check output.s3, and the AWS_* "
            "variables that spec.podTemplatePatch.env gives the trainer."
        )


class UploadFailedError(MizzenError):
    """The bucket did not answer; it may later."""

    reason = "UploadFailed"

    def __init__(self, address: str, what: str) -> None:
        super().__init__(f"The artifact cannot be copied to {address}: {what}.")


class StorageNotWritableError(JobError):
    """The folder refuses us."""

    reason = "StorageNotWritable"
