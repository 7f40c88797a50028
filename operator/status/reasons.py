"""Why a condition is what it is: every reason the operator may write, in one enum.

A reason never changes its meaning: alerts and documentation pages are keyed by it.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """CamelCase words for machines; the message beside them is for people."""

    # Nothing is wrong.
    VALID = "Valid"
    AS_EXPECTED = "AsExpected"
    IN_SERVICE = "InService"
    SETTLED = "Settled"
    SCALED_TO_ZERO = "ScaledToZero"
    SCALING_DISABLED = "ScalingDisabled"
    SCALING_ON_LOAD = "FollowsLoad"
    SCALING_NOT_YET = "NotYetDecided"
    SCALING_DRY_RUN = "DryRun"
    CAPACITY_UNKNOWN = "CapacityUnknown"
    ADAPTERS_LOADED = "AdaptersLoaded"
    NO_ADAPTERS = "NoAdapters"

    # Work is under way.
    STARTING = "Starting"
    ROLLING_OUT = "RollingOut"
    PAUSED = "Paused"
    DRAINING = "Draining"
    LOADING_ADAPTERS = "LoadingAdapters"

    # The autoscaler cannot do what it was asked for.
    SIGNALS_UNKNOWN = "SignalsUnknown"
    OTHER_AUTOSCALER = "OtherAutoscaler"
    TIME_ZONE_UNKNOWN = "TimeZoneUnknown"
    SCALING_LIMITED = "ScalingLimited"
    SLO_UNREACHABLE = "SloUnreachable"
    REPLICAS_STUCK = "ReplicasStuck"

    # A new revision was given up.
    ROLLED_BACK = "RolledBack"

    # The spec or the cluster must change.
    INVALID_SPEC = "InvalidSpec"
    DOES_NOT_FIT = "DoesNotFit"
    TOO_MANY_DEVICES = "MoreDevicesThanAnyNode"
    UNSCHEDULABLE = "Unschedulable"
    CLAIM_NOT_FOUND = "ClaimNotFound"
    CLAIM_NOT_BOUND = "ClaimNotBound"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG = "ContainerConfigInvalid"
    SECRET_NOT_FOUND = "SecretNotFound"
    POD_REFUSED = "PodRefused"
    EVICTED = "Evicted"
    QUOTA_EXCEEDED = "QuotaExceeded"
    OUT_OF_MEMORY = "OutOfMemory"
    RUNTIME_CRASHED = "RuntimeCrashed"
    RUNTIME_CONFIG_INVALID = "RuntimeConfigInvalid"
    ADAPTER_REFUSED = "AdapterRefused"
    ADMIN_TOKEN_MISSING = "AdminTokenMissing"

    # Said by the runtime in its last words (runtime/errors.py).
    BAD_MODEL = "BadModel"
    MODEL_NOT_FOUND = "ModelNotFound"
    NOT_A_MODEL = "NotAModel"
    UNKNOWN_ARCHITECTURE = "UnknownArchitecture"
    REMOTE_CODE_REFUSED = "RemoteCodeRefused"
    PICKLED_WEIGHTS_REFUSED = "PickledWeightsRefused"
    SHARD_TRUNCATED = "ShardTruncated"
    WEIGHTS_MISSING = "WeightsMissing"
    WEIGHT_SHAPE_MISMATCH = "WeightShapeMismatch"
    QUANTIZATION_UNSUPPORTED = "QuantizationUnsupported"
    TENSOR_PARALLEL_INVALID = "TensorParallelInvalid"
    SOURCE_INVALID = "SourceInvalid"
    SOURCE_NOT_FOUND = "SourceNotFound"
    SOURCE_FORBIDDEN = "SourceForbidden"
    SOURCE_UNREACHABLE = "SourceUnreachable"
    SOURCE_NOT_CACHED = "SourceNotCached"
    CHECKSUM_MISMATCH = "ChecksumMismatch"
    CACHE_TOO_SMALL = "CacheTooSmall"
    UNKNOWN_TOKENIZER = "UnknownTokenizer"
    CONTEXT_TOO_LONG = "ContextTooLong"
    KV_CACHE_TOO_SMALL = "KvCacheTooSmall"
    DRAFT_UNFIT = "DraftUnfit"
    PORT_TAKEN = "PortTaken"
    ENGINE_DEAD = "EngineDead"
    BAD_ADAPTER = "BadAdapter"
    RANK_LOST = "RankLost"
    NODES_DISAGREE = "NodesDisagree"
    INTERNAL_ERROR = "InternalError"

    # Fine-tune jobs.
    PENDING = "Pending"
    ADMITTED = "Admitted"
    NO_SPARE_CAPACITY = "NoSpareCapacity"
    YIELD_TOO_SLOW = "YieldTooSlow"
    BEHIND_OLDER_JOB = "BehindOlderJob"
    WAITS_FOR_DEVICES = "WaitsForDevices"
    YIELDED = "Yielded"
    NODES_UNKNOWN = "NodesUnknown"
    PREPARING = "Preparing"
    RUNNING = "Running"
    YIELDING = "Yielding"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    PROMOTING = "Promoting"
    SUSPENDED = "Suspended"
    NOT_SUSPENDED = "NotSuspended"
    FINISHED = "Finished"
    COMPLETED = "Completed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    EVALUATION_PASSED = "EvaluationPassed"
    EVALUATION_FAILED = "EvaluationFailed"
    NO_EVALUATION = "NoEvaluation"
    PUBLISHED = "Published"
    NOT_PUBLISHED = "NotPublished"
    PROMOTED = "Promoted"
    NO_PROMOTION = "NoPromotion"
    DEPLOYMENT_NOT_FOUND = "DeploymentNotFound"
    BASE_MODEL_NOT_FOUND = "BaseModelNotFound"
    JOB_CONFIG_INVALID = "JobConfigInvalid"
    TRAINER_CRASHED = "TrainerCrashed"
    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_EMPTY = "DatasetEmpty"
    DATASET_NOT_JSON = "DatasetNotJson"
    DATASET_FORMAT_UNKNOWN = "DatasetFormatUnknown"
    DATASET_REFUSED_BY_TEMPLATE = "DatasetRefusedByTemplate"
    DATASET_NO_ASSISTANT_TURNS = "DatasetNoAssistantTurns"
    DATASET_NEVER_STOPS = "DatasetNeverStops"
    DATASET_DIGEST_MISMATCH = "DatasetDigestMismatch"
    DATASET_UNREACHABLE = "DatasetUnreachable"
    LOSS_NOT_FINITE = "LossNotFinite"
    TEACHER_TOKENIZER_DIFFERS = "TeacherTokenizerDiffers"
    TEACHER_NOT_FOUND = "TeacherNotFound"
    TEACHER_UNAVAILABLE = "TeacherUnavailable"
    JUDGE_FAILED = "JudgeFailed"
    JUDGE_UNREACHABLE = "JudgeUnreachable"
    JUDGE_NOT_FOUND = "JudgeNotFound"
    MEMORY_TOO_SMALL = "MemoryTooSmall"
    TRAINING_DOES_NOT_FIT = "TrainingDoesNotFit"
    TRAINER_HANGS = "TrainerHangs"
    CHECKPOINT_MISMATCH = "CheckpointMismatch"
    BASE_MODEL_CHANGED = "BaseModelChanged"
    STORAGE_FULL = "StorageFull"
    STORAGE_NOT_WRITABLE = "StorageNotWritable"


def reason_or(word: str, fallback: Reason) -> Reason:
    """Return the reason a process named, or `fallback` for a word we do not know."""
    try:
        return Reason(word)
    except ValueError:
        return fallback
