"""Who plays a job's roles: the trainer, or processes of their own on Ray."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from mizzen.runtime.train.roles.roles import OwnRoles, Roles
from mizzen.runtime.train.surroundings import Surroundings

_LOOPBACK = "127.0.0.1"


def cast_roles(around: Surroundings) -> Roles:
    """Return who plays the roles, ready to begin; Ray's processes end with this one."""
    if around.config.roles == "InProcess":
        return OwnRoles(around)
    os.environ.update(ray_settings(token=secrets.token_hex(32), address=_LOOPBACK))
    # Ray reads its settings when it is imported, takes seconds for that, and few jobs want it.
    from mizzen.runtime.train.roles.node import start_node  # noqa: PLC0415
    from mizzen.runtime.train.roles.on_ray import RayRoles  # noqa: PLC0415

    return RayRoles(around, start_node(address=_LOOPBACK, place="rank0"), places=["rank0"])


def ray_settings(*, token: str, address: str) -> Mapping[str, str]:
    """Return the environment of all of Ray's processes in a pod. Pure."""
    return {
        # Every call has to bear the token: calls carry pickles, and those are code.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Named after where Ray does this by itself: 0 keeps it from binding more than loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if address == _LOOPBACK else "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would kill a role when the *node* is nearly full, whoever filled it.
        "RAY_memory_monitor_refresh_ms": "0",
        # A role imports torch first, which on a busy machine takes longer than Ray waits.
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_agent_register_timeout_ms": "600000",
    }
