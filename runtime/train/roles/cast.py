"""Who plays a job's roles: the trainer, or processes of their own on Ray, in its pod and others."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping

from mizzen.runtime.parallel.handshake import group_key
from mizzen.runtime.parallel.nodes import read_secret
from mizzen.runtime.train.config import TrainConfig, TrainerEnvironment
from mizzen.runtime.train.roles.roles import OwnRoles, Roles
from mizzen.runtime.train.roles.served import ServedRoles
from mizzen.runtime.train.stop import StopFlag
from mizzen.runtime.train.surroundings import Stage, Surroundings
from mizzen.runtime.train.workers import Workers

LOOPBACK = "127.0.0.1"


def open_stage(
    config: TrainConfig, environment: TrainerEnvironment, workers: Workers, stop: StopFlag
) -> Stage | None:
    """Start this pod's part of Ray and return where roles can be played; None where none are.

    Raises:
        SecretMissingError: the token that proves who belongs to the job cannot be read.
    """
    if config.roles == "InProcess":
        return None
    address = workers.own_address or LOOPBACK
    os.environ.update(ray_settings(token=_token(config, environment), address=address))
    # Ray reads its settings when it is imported, takes seconds for that, and few jobs want it.
    from mizzen.runtime.train.roles.node import enter, start_node  # noqa: PLC0415

    head = None if workers.is_leader else workers.hear().decode()
    place = _place(environment.node_rank)
    head = str(start_node(address=address, place=place, head=head).address)
    if workers.is_leader:
        workers.tell(head.encode())
        enter(head)
        stop.listen_to_signals()  # Ray has put its own in our place
    return Stage(tuple(map(_place, range(config.workers))))


def close_stage(stage: Stage | None) -> None:
    """Leave Ray before the other pods do: it would tell of their end as of an accident."""
    if stage is not None:
        import ray  # noqa: PLC0415 - as above

        ray.shutdown()


def cast_roles(around: Surroundings) -> Roles:
    """Return who plays the roles, ready to begin; Ray's processes end with this one."""
    if around.config.rl is not None and around.config.rl.rollout is not None:
        return ServedRoles(around, around.config.rl.rollout)
    if around.stage is None:
        return OwnRoles(around)
    from mizzen.runtime.train.roles.on_ray import RayRoles  # noqa: PLC0415 - as above

    return RayRoles(around, around.stage)


def ray_settings(*, token: str, address: str) -> Mapping[str, str]:
    """Return the environment of all of Ray's processes in a pod. Pure."""
    return {
        # Every call has to bear the token: calls carry pickles, and those are code.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # Named after where Ray does this by itself: 0 keeps it from binding more than loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if address == LOOPBACK else "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Roles are what the pod is for. By default they give way to everything on the machine.
        "RAY_worker_niceness": "0",
        # Ray would kill a role when the *node* is nearly full, whoever filled it.
        "RAY_memory_monitor_refresh_ms": "0",
        # A role imports torch first, which on a busy machine takes longer than Ray waits.
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_agent_register_timeout_ms": "600000",
    }


def _token(config: TrainConfig, environment: TrainerEnvironment) -> str:
    if config.workers == 1:
        return secrets.token_hex(32)
    secret = read_secret(environment.admin_token_file)
    return group_key(secret, f"Ray {config.job} {config.generation}").hex()


def _place(rank: int) -> str:
    return f"rank{rank}"
