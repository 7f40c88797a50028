"""Every condition type and every reason our resources can show: the one list of both.

A reason is part of the API: people write alerts on it. Add freely, rename never.
"""

from enum import StrEnum


class ConditionType(StrEnum):
    """Types of the conditions in `status.conditions`."""

    READY = "Ready"
    ACCEPTED = "Accepted"
    AVAILABLE = "Available"
    PROGRESSING = "Progressing"
    ADAPTERS_READY = "AdaptersReady"
    DEGRADED = "Degraded"
    ADMITTED = "Admitted"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    EVALUATION_PASSED = "EvaluationPassed"
    PUBLISHED = "Published"
    PROMOTED = "Promoted"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    # kstatus reads these two: each is present only while it is true.
    RECONCILING = "Reconciling"
    STALLED = "Stalled"


class Reason(StrEnum):
    """Reasons of conditions and Events, for both kinds."""

    # Either kind.
    ACCEPTED = "Accepted"
    INVALID_SPEC = "InvalidSpec"
    API_ERROR = "ApiError"
    PENDING = "Pending"
    UNKNOWN = "Unknown"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CRASHED = "ContainerCrashed"
    OUT_OF_MEMORY = "OutOfMemory"
    POD_REFUSED = "PodRefused"
    QUOTA_EXCEEDED = "QuotaExceeded"
    VOLUME_NOT_READY = "VolumeNotReady"

    # LLMDeployment: replicas.
    ALL_REPLICAS_READY = "AllReplicasReady"
    SCALED_TO_ZERO = "ScaledToZero"
    REPLICAS_STARTING = "ReplicasStarting"
    REPLICAS_UNAVAILABLE = "ReplicasUnavailable"
    MINIMUM_AVAILABLE = "MinimumAvailable"
    ROLLING_OUT = "RollingOut"
    ROLLED_OUT = "RolledOut"
    SCALING = "Scaling"
    DRAINING = "Draining"

    # LLMDeployment: what the runtime says about the model. The runtime hands over the word.
    MODEL_NOT_FOUND = "ModelNotFound"
    BAD_MODEL = "BadModel"
    UNSUPPORTED_ARCHITECTURE = "UnsupportedArchitecture"
    WEIGHTS_DO_NOT_FIT = "WeightsDoNotFit"
    RUNTIME_FAILED = "RuntimeFailed"

    # LLMDeployment: adapters.
    NO_ADAPTERS = "NoAdapters"
    ADAPTERS_LOADED = "AdaptersLoaded"
    ADAPTERS_LOADING = "AdaptersLoading"
    ADAPTER_FAILED = "AdapterFailed"

    # FineTuneJob.
    BASE_MODEL_NOT_FOUND = "BaseModelNotFound"
    DATASET_NOT_FOUND = "DatasetNotFound"
    BAD_DATASET = "BadDataset"
    BAD_CONFIGURATION = "BadConfiguration"
    POD_CREATED = "PodCreated"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    YIELDED = "Yielded"
    SUSPENDED_BY_SPEC = "SuspendedBySpec"
    NOT_SUSPENDED = "NotSuspended"
    RESTARTING = "Restarting"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    EVALUATION_PASSED = "EvaluationPassed"
    EVALUATION_FAILED = "EvaluationFailed"
    NOT_EVALUATED = "NotEvaluated"
    PUBLISHED = "Published"
    NOT_PUBLISHED = "NotPublished"
    PROMOTED = "Promoted"
    PROMOTING = "Promoting"
    NOT_PROMOTED = "NotPromoted"
    COMPLETED = "Completed"
    NOT_FINISHED = "NotFinished"
