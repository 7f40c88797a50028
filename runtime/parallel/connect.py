"""How ranks find each other and get their collectives. Gloo on CPU, NCCL on GPU.

We build the process group ourselves instead of torch's global one: several groups may live in one
process, and nothing listens on an interface that nobody named.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.group import RankGroup

# torch exports and types only its global group; the classes beneath are public all the same.
dist: Any = torch.distributed

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where and how the ranks of one host meet."""

    size: int
    directory: Path  # private to us: who may write there may join
    device: torch.device
    timeout_s: float


def connect(rank: int, meeting: Meeting) -> RankGroup:
    """Join the others; when this returns, every rank has come and the directory may go.

    Raises:
        RankLostError: not every rank came in time.
    """
    size, timeout = meeting.size, timedelta(seconds=meeting.timeout_s)
    build = _nccl if meeting.device.type == "cuda" else _gloo
    try:
        store = dist.FileStore(str(meeting.directory / "store"), size)
        group = RankGroup(rank, size, build(store, rank, size, timeout))
    except RuntimeError as error:
        raise RankLostError(f"Not all of {size} ranks met in {meeting.timeout_s:g} s.") from error
    first = torch.cuda.current_device() if meeting.device.type == "cuda" else "cpu"
    group.all_reduce(torch.zeros(1, device=first))
    return group


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(rank)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)
