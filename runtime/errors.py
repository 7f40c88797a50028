"""Every error of the data plane: a reason for machines and a sentence that says what to change."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import ClassVar

EXIT_BAD_CONFIGURATION = 42
EXIT_RANK_LOST = 76
# kubelet keeps 4096 bytes, and a character may need four.
_TERMINATION_LOG_CHARACTERS = 1000


class MizzenError(Exception):
    """Base of our errors. `reason` becomes a condition's reason, so it never changes."""

    reason: ClassVar[str] = "InternalError"
    exit_code: ClassVar[int] = EXIT_BAD_CONFIGURATION  # of a process that ends with it


class BadModelError(MizzenError):
    """The model cannot be served or trained as it is; trying again will not help."""

    reason = "BadModel"


class ModelNotFoundError(BadModelError):
    """Nothing lies at the model's path."""

    reason = "ModelNotFound"


class NotAModelError(BadModelError):
    """Something lies at the path, but it is neither a checkpoint directory nor a GGUF file."""

    reason = "NotAModel"


class UnknownArchitectureError(BadModelError):
    """The decoder has no settings for this model family, or not for this variant of it."""

    reason = "UnknownArchitecture"


class RemoteCodeRefusedError(BadModelError):
    """The model wants code from its own directory to run."""

    reason = "RemoteCodeRefused"


class PickledWeightsRefusedError(BadModelError):
    """The weights exist only in a format that runs code when it is read."""

    reason = "PickledWeightsRefused"


class ShardTruncatedError(BadModelError):
    """A weight file is shorter than its own header says."""

    reason = "ShardTruncated"


class WeightsMissingError(BadModelError):
    """The checkpoint lacks a file or a tensor that its own description promises."""

    reason = "WeightsMissing"


class WeightShapeError(BadModelError):
    """A tensor's shape disagrees with the model's configuration."""

    reason = "WeightShapeMismatch"


class TensorParallelInvalidError(BadModelError):
    """The model's heads cannot be spread over this many ranks."""

    reason = "TensorParallelInvalid"


class PipelineInvalidError(BadModelError):
    """The model has fewer layers than it is to have stages."""

    reason = "PipelineInvalid"


class QuantizationUnsupportedError(BadModelError):
    """The weights cannot be stored in so few bits on this device."""

    reason = "QuantizationUnsupported"


class BadAdapterError(MizzenError):
    """The LoRA adapter cannot be used with this model; the message says why."""

    reason = "BadAdapter"


class RankLostError(MizzenError):
    """A rank of the group died or stayed silent; the group cannot go on."""

    reason = "RankLost"
    exit_code = EXIT_RANK_LOST  # not a mistake in the configuration: starting again may help


def report_fatal(error: MizzenError) -> int:
    """Tell the operator and the reader of the log why this process ends; return the exit code.

    The document goes to `$MIZZEN_TERMINATION_LOG` (`/dev/termination-log` in a pod).
    """
    message = str(error)
    print(message, file=sys.stderr)  # noqa: T201 - the process ends here, logging may be gone
    cut = message[:_TERMINATION_LOG_CHARACTERS]
    document = json.dumps({"reason": error.reason, "message": cut}, ensure_ascii=False)
    log = Path(os.environ.get("MIZZEN_TERMINATION_LOG", "/dev/termination-log"))
    with contextlib.suppress(OSError):  # outside a pod there is no such file
        log.write_text(document)
    return error.exit_code
