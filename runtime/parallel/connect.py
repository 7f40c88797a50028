"""How ranks find each other and get their collectives. Gloo on CPU, NCCL on GPU.

We build the process group ourselves instead of torch's global one: several groups may live in one
process, and nothing listens on an interface that nobody named.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from mizzen.runtime.errors import RankLostError
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.parallel.stages import Stages

# torch exports and types only its global group; the classes beneath are public all the same.
dist: Any = torch.distributed

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where and how ranks meet, as those of one pod see it."""

    size: int  # ranks of all pods
    stages: int = 1  # into which the model's layers are cut; each has equally many ranks
    first: int = 0  # rank of this pod
    # A file in a folder that is private to us: who may write there may join. Over several pods
    # the address and the port of a store in the leader's pod.
    store: Path | tuple[str, int]
    name: str = ""  # tells groups apart that meet at one store
    address: str = LOOPBACK  # by which the others reach this pod
    device: torch.device
    timeout_s: float
    # The same in collectives at first: one rank may read its weights for much longer than another.
    start_timeout_s: float | None = None


def connect(rank: int, meeting: Meeting) -> RankGroup:
    """Join the others; when this returns, every rank has come and a store's file may go.

    Raises:
        RankLostError: not every rank came in time.
    """
    try:
        group = _join(rank, meeting)
    except RuntimeError as error:
        raise RankLostError(
            f"Not all of {meeting.size} ranks met in {meeting.timeout_s:g} s."
        ) from error
    first = torch.cuda.current_device() if meeting.device.type == "cuda" else "cpu"
    group.all_reduce(torch.zeros(1, device=first))
    group.stages.meet(torch.zeros(1, device=first))
    if meeting.start_timeout_s is not None:
        group.wait_at_most(meeting.start_timeout_s)
    return group


def _join(rank: int, meeting: Meeting) -> RankGroup:
    build = _gloo
    if meeting.device.type == "cuda":
        torch.cuda.set_device(rank - meeting.first)
        build = _nccl
    store = _store(meeting)
    everyone = build(store, rank, meeting.size, meeting)
    stages = Stages(meeting.stages, rank=rank, size=meeting.size, process_group=everyone)
    if stages.count == 1:
        return RankGroup(rank, meeting.size, everyone, stages)
    own = None
    if stages.width > 1:
        # A store may be shared, names in it may not: both groups use the same ones.
        part = dist.PrefixStore(f"stage {stages.index}", store)
        own = build(part, stages.place, stages.width, meeting)
    return RankGroup(stages.place, stages.width, own, stages)


def open_store(address: str, timeout_s: float) -> Any:
    """Return a store that listens on this address alone, on a free port (`store.port`)."""
    # Left to itself torch listens on every interface.
    listening = socket.create_server((address, 0))
    port = listening.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def _store(meeting: Meeting) -> Any:
    if isinstance(meeting.store, Path):
        return dist.FileStore(str(meeting.store), meeting.size)
    host, port = meeting.store
    store = dist.TCPStore(host, port, timeout=timedelta(seconds=meeting.timeout_s))
    return dist.PrefixStore(meeting.name, store) if meeting.name else store


def _gloo(store: Any, place: int, size: int, meeting: Meeting) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=meeting.address)]
    options._timeout = timedelta(seconds=meeting.timeout_s)
    return dist.ProcessGroupGloo(store, place, size, options)


def _nccl(store: Any, place: int, size: int, meeting: Meeting) -> Any:
    if meeting.address == LOOPBACK:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=meeting.timeout_s)
    return dist.ProcessGroupNCCL(store, place, size, options)
