"""`mizzen gateway`: run until told to stop, then let open requests end."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import sys

from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.kube import NoClusterError
from mizzen.runtime.gateway.server import Gateway

_CONFIG_EXIT = 42


def run(config: GatewayConfig) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status."""
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    _allow_connections()
    return asyncio.run(serve(config))


def _allow_connections() -> None:
    """Have as many files open as the system lets us: its usual 1024 are a few hundred clients."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def serve(config: GatewayConfig) -> int:
    """Serve until a signal comes; a second one ends it at once."""
    gateway = Gateway(config)
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    try:
        await gateway.start()
    except (OSError, ValueError, NoClusterError) as error:
        sys.stderr.write(f"mizzen gateway: {error}{_hint(error)}\n")
        await gateway.close()
        return _CONFIG_EXIT
    await told_to_stop.wait()
    told_to_stop.clear()
    drained = asyncio.create_task(gateway.drain())
    again = asyncio.create_task(told_to_stop.wait())
    await asyncio.wait((drained, again), return_when=asyncio.FIRST_COMPLETED)
    for task in (drained, again):
        task.cancel()
    await asyncio.gather(drained, again, return_exceptions=True)
    return 0


def _hint(error: Exception) -> str:
    if not isinstance(error, NoClusterError):
        return ""
    return (
        " Set --kubeconfig PATH, or do without Kubernetes: --upstream NAME=http://127.0.0.1:8000 "
        "--auth off."
    )
