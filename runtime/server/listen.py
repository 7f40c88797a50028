"""Ports: bound before anything is loaded, and the HTTP servers behind them."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from mizzen.runtime.errors import MizzenError


class PortTakenError(MizzenError):
    """A port the server needs is in use."""

    reason = "PortTaken"


def bind_port(host: str, port: int) -> socket.socket:
    """Return a TCP socket bound to `port`, any free one for 0.

    Raises:
        PortTakenError: something else has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol left at 0, event loops do not see TCP and leave Nagle's algorithm on:
    # 40 ms more for every answer of two packets.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise port_taken(host, port, error) from error
    bound.setblocking(False)
    return bound


def port_taken(host: str, port: int, error: Exception) -> PortTakenError:
    """Return the error of a port that cannot be had."""
    return PortTakenError(
        f"Cannot listen on {host}:{port} ({error}). Stop what uses it or choose another port with "
        "--port, --grpc-port or --admin-port."
    )


class HttpServer:
    """A uvicorn server without signal handlers of its own, running as a task."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        self._server = _QuietServer(
            uvicorn.Config(
                app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                # Longer than any client keeps an idle connection: were we the first to close,
                # a request could be on its way, and lost.
                timeout_keep_alive=75,
                # A client could otherwise claim any address, loopback included.
                proxy_headers=False,
            )
        )
        self._task = asyncio.create_task(self._server.serve([bound]))

    async def stop(self, grace_s: int) -> None:
        """Close the port and the idle connections; answers under way get `grace_s`."""
        self._server.config.timeout_graceful_shutdown = grace_s
        self._server.should_exit = True
        await self._task


class _QuietServer(uvicorn.Server):
    """Leaves the process's signals alone: they belong to the polite stop."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield
