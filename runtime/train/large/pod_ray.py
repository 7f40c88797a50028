"""The Ray that a pod prepares its data on: the one of the job's roles, or one of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from mizzen.runtime.train.roles.cast import LOOPBACK, ray_settings
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.surroundings import Stage

_PLACE = "data"


@contextmanager
def pod_ray(stage: Stage | None, stop: StopFlag) -> Iterator[str]:
    """Yield the place where this pod's processes are; what was started for it ends afterwards."""
    if stage is not None:
        yield stage.places[0]
        return
    os.environ.update(ray_settings(token=secrets.token_hex(32), address=LOOPBACK))
    # Ray reads its settings when it is imported, takes seconds for that, and few jobs want it.
    from mizzen.runtime.train.roles.node import end_node, enter, start_node  # noqa: PLC0415

    node = start_node(address=LOOPBACK, place=_PLACE)
    try:
        enter(node.address)
        stop.listen_to_signals()  # Ray has put its own in our place
        yield _PLACE
    finally:
        end_node(node)
