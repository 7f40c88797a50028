"""The memory of a device that was another pod's a moment ago.

A pod may be gone seconds before the driver has its memory back (NVIDIA/k8s-device-plugin#290). Who
loads a model meanwhile runs out of memory, or takes what is left for all there is.
"""

import logging
import time
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

_WHOLE_RATIO = 0.9  # more than that is never free beside contexts and what drivers keep
_STEP_RATIO = 0.01  # less than that is no sign that memory comes back
_STILL_S = 15.0
_LOOK_S = 0.5
MIB = 1 << 20


def wait_for_memory(
    device: torch.device,
    *,
    look: Callable[[torch.device], tuple[int, int]] = torch.cuda.mem_get_info,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait while a GPU's memory comes back; where none does, somebody shares the device.

    `look` returns how many of its bytes are free, and how many there are.
    """
    if device.type != "cuda":
        return
    most, since_s = 0, now_s()
    while True:
        free, total = look(device)
        if free >= _WHOLE_RATIO * total:
            return
        if free - most >= _STEP_RATIO * total:
            most, since_s = free, now_s()
        elif now_s() - since_s >= _STILL_S:
            log.warning(
                "Others hold %d of the device's %d MiB and give none back; going on with the rest.",
                (total - free) // MIB,
                total // MIB,
            )
            return
        sleep(_LOOK_S)
