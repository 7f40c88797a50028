"""The Ray processes of one pod: the head's where roles begin, a member's where they only live.

Ray's public ways to start (`ray.init`, `ray start`) start more than roles need: a monitor for
autoscaling, whose port asks nobody who they are, a server for remote clients and a log monitor. So
the class behind both is used, which may change between versions: Ray's is pinned to the minor one.
"""

from __future__ import annotations

import logging
import tempfile

from ray._private.node import Node
from ray._private.parameter import RayParams

log = logging.getLogger(__name__)

# Of what roles say to each other; weights go through it a bucket at a time.
_STORE_BYTES = 256 << 20
# How many roles one pod can play.
_SEATS = 16


def start_node(*, address: str, place: str, head: str | None = None) -> str:
    """Start them and return the head's address. They end with this process, however it ends.

    Args:
        address: This pod's, by which the other pods reach it.
        place: The resource by which a role asks for this pod.
        head: The head's address; where there is none, this pod's is the head.
    """
    node = Node(
        RayParams(
            node_ip_address=address,
            gcs_address=head,
            gcs_server_port=None if head else 0,
            num_cpus=0,
            num_gpus=0,
            resources={place: _SEATS},
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,
            no_monitor=True,
            # A new one each: nothing may be found there of another user of this machine.
            temp_dir=tempfile.mkdtemp(prefix="ray-"),
        ),
        head=head is None,
        shutdown_at_exit=False,
        spawn_reaper=True,  # the kernel ends them with their parent
    )
    log.info("Ray is at %s; its logs are in %s.", node.address, node.get_session_dir_path())
    return str(node.address)
