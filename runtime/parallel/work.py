"""Waits for what a process group was asked to do; its errors become ours."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from mizzen.runtime.errors import RankLostError


def complete(rank: int, start: Callable[[], Any]) -> None:
    """Start some work of a process group and wait until it is done.

    Raises:
        RankLostError: another rank is gone, or came too late; the text names the one that waited.
    """
    try:
        start().wait()
    except RuntimeError as error:
        # Gloo and NCCL report a closed connection and a time-out as plain RuntimeErrors. Their
        # text names ports, so it stays the cause and does not enter the message.
        raise RankLostError(f"Rank {rank} lost another rank in a collective.") from error


def limit_waits(process_group: Any, timeout_s: float) -> None:
    """Have later work of a process group wait no longer than this; None has nobody to wait for."""
    if process_group is not None:
        process_group._set_default_timeout(timedelta(seconds=timeout_s))
