"""The Ray processes of one pod: the head's where roles begin, a member's where they only live.

Ray's public ways to start (`ray.init`, `ray start`) start more than roles need: a monitor for
autoscaling, whose port asks nobody who they are, a server for remote clients and a log monitor. So
the class behind both is used, which may change between versions: Ray's is pinned to the minor one.
"""

from __future__ import annotations

import logging
import random
import shutil
import socket
import tempfile
from contextlib import suppress
from errno import EADDRINUSE
from pathlib import Path

import ray
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray._raylet import (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    persist_port,
)

log = logging.getLogger(__name__)

# Of what roles say to each other; weights go through it a bucket at a time.
_STORE_BYTES = 256 << 20
# How many roles one pod can play.
_SEATS = 16
# Below those that systems hand out (32768 and up, as a rule), above those of Ray's workers: nobody
# comes to one by chance before the agent has opened it.
_PORTS, _TRIES = range(20_000, 32_000), 100
# Of its agents, which here do not open them.
_UNUSED_PORTS = (
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
)


class PodNode(Node):
    """A node whose raylet does not wait for its agents to tell it their ports.

    It would wait 15 s, which is too short where processors are busy, and abort.
    """

    def start_ray_processes(self) -> None:
        """Write down the ports that are not used, as the agents will, and go on."""
        for name in _UNUSED_PORTS:
            persist_port(self._session_dir, self._node_id, name, -1)
        super().start_ray_processes()


def start_node(*, address: str, place: str, head: str | None = None) -> PodNode:
    """Start them; `address` of what is returned is the head's. They end with this process.

    Args:
        address: This pod's, by which the other pods reach it.
        place: The resource by which a role asks for this pod.
        head: The head's address; where there is none, this pod's is the head.
    """
    node = PodNode(
        RayParams(
            node_ip_address=address,
            gcs_address=head,
            gcs_server_port=None if head else 0,
            num_cpus=0,
            num_gpus=0,
            resources={place: _SEATS},
            runtime_env_agent_port=_free_port(address),  # else it is waited for in the same way
            object_store_memory=_STORE_BYTES,
            include_dashboard=False,
            include_log_monitor=False,  # type: ignore[arg-type]
            no_monitor=True,
            # A new one each: nothing may be found there of another user of this machine.
            temp_dir=tempfile.mkdtemp(prefix="ray-"),
        ),
        head=head is None,
        shutdown_at_exit=False,
        spawn_reaper=True,  # the kernel ends them with their parent
    )
    log.info("Ray is at %s; its logs are in %s.", node.address, node.get_session_dir_path())  # type: ignore[no-untyped-call]
    return node


def enter(head: str) -> None:
    """Become the process that places roles and asks them."""
    ray.init(address=head, log_to_driver=False, configure_logging=False)


def end_node(node: PodNode) -> None:
    """Leave Ray and end all that was started for it in this pod, with what it wrote."""
    ray.shutdown()
    node.kill_all_processes(check_alive=False, wait=True)  # type: ignore[no-untyped-call]
    shutil.rmtree(Path(node.get_session_dir_path()).parent, ignore_errors=True)  # type: ignore[no-untyped-call]


def _free_port(address: str) -> int:
    """Return a port that is free, and that nobody is given who asks for any.

    Raises:
        OSError: all that were tried are taken.
    """
    for port in random.SystemRandom().sample(_PORTS, k=min(_TRIES, len(_PORTS))):
        with suppress(OSError), socket.create_server((address, port)):
            return port
    raise OSError(EADDRINUSE, f"No port of {_PORTS[0]} to {_PORTS[-1]} is free at {address}.")
