"""Which pods make up a group, and how they find each other: pod 0 waits, the others come to it.

Whoever comes has to prove that it holds the group's secret (`handshake.py`); strangers are turned
away and the wait goes on.
"""

import itertools
import json
import logging
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from mizzen.runtime.errors import MizzenError, RankLostError
from mizzen.runtime.parallel.handshake import (
    Caller,
    StrangerError,
    answer_caller,
    call_leader,
    check_caller,
    group_key,
)
from mizzen.runtime.parallel.line import Line

log = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_TRY_AGAIN_S = 0.5
_BACKLOG = 128


class NodesDisagreeError(MizzenError):
    """The pods of a group were started with different settings."""

    reason = "NodesDisagree"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The pods of a group, as one of them sees them."""

    count: int
    index: int  # of this pod; 0 leads
    leader: str  # a name or an address of pod 0 that all can reach
    port: int
    host: str  # where pod 0 listens
    secret: bytes = field(repr=False)
    wait_s: float  # how long the first pod to come waits for the last

    @property
    def key(self) -> bytes:
        """What the pods of this group sign with."""
        return group_key(self.secret, f"{self.leader}:{self.port}")


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A pod that has proved itself and waits to be let in."""

    number: int  # in the order in which the connections came
    index: int
    connection: socket.socket
    caller: Caller


class SecretMissingError(MizzenError):
    """The secret by which the pods of a group know each other cannot be read."""

    reason = "AdminTokenMissing"


def read_secret(path: Path) -> bytes:
    """Return the first line of a mounted Secret.

    Raises:
        SecretMissingError: there is none.
    """
    try:
        return path.read_bytes().split()[0]
    except (OSError, IndexError) as error:
        raise SecretMissingError(
            f"The pods of a group know each other by the token in {path}, and it cannot be read: "
            "mount the Secret, or correct --admin-token-file."
        ) from error


def meet_followers(nodes: Nodes, agreement: str) -> list[Line]:
    """Wait for every other pod; return a line to each, by index.

    Args:
        nodes: The group, seen by its leader.
        agreement: What all pods must have been started with.

    Raises:
        RankLostError: not all of them came in time.
    """
    lines: dict[int, Line] = {}
    newest: dict[int, int] = {}  # a connection's number, by its pod's index
    arrivals: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
    ends_at = time.monotonic() + nodes.wait_s
    with socket.create_server((nodes.host, nodes.port), backlog=_BACKLOG) as door:
        threading.Thread(
            target=_open_door, args=(door, nodes, agreement, arrivals), daemon=True
        ).start()
        try:
            while len(lines) < nodes.count - 1:
                left_s = ends_at - time.monotonic()
                arrival = arrivals.get(timeout=max(0.0, left_s))
                index = arrival.index
                # Answered here, so that who has been let in is one of the lines already.
                if arrival.number < newest.get(index, 0) or not _let_in(arrival, nodes.key):
                    arrival.connection.close()
                    continue
                if index in lines:  # it was restarted meanwhile
                    lines[index].close()
                newest[index] = arrival.number
                lines[index] = Line(arrival.connection, f"Pod {index}")
        except queue.Empty:
            for line in lines.values():
                line.close()
            raise RankLostError(_who_is_missing(nodes, lines)) from None
        finally:
            door.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
    return [lines[index] for index in sorted(lines)]


def reach_leader(nodes: Nodes, agreement: str) -> Line:
    """Come to pod 0, trying again until it is there.

    Raises:
        RankLostError: it could not be reached in time.
        NodesDisagreeError: it was started with other settings.
    """
    hello = json.dumps({"node": nodes.index, "nodes": nodes.count, "agreement": agreement})
    ends_at = time.monotonic() + nodes.wait_s
    told = ""
    while True:
        try:
            return _call_leader(nodes, hello.encode())
        except (OSError, EOFError, StrangerError) as error:
            if time.monotonic() >= ends_at:
                raise RankLostError(_why_unreached(nodes, error)) from error
            if str(error) != told:
                told = str(error)
                log.info("no leader at %s:%d yet: %s", nodes.leader, nodes.port, told)
            time.sleep(_TRY_AGAIN_S)


def _open_door(
    door: socket.socket,
    nodes: Nodes,
    agreement: str,
    arrivals: "queue.SimpleQueue[_Arrival]",
) -> None:
    for number in itertools.count(1):
        try:
            connection, (address, *_) = door.accept()
        except OSError:  # closed: everybody is there, or the time is up
            return
        # Each in a thread of its own: one that connects and says nothing keeps nobody out.
        threading.Thread(
            target=_greet,
            args=(number, connection, address, nodes, agreement, arrivals),
            daemon=True,
        ).start()


def _greet(
    number: int,
    connection: socket.socket,
    address: str,
    nodes: Nodes,
    agreement: str,
    arrivals: "queue.SimpleQueue[_Arrival]",
) -> None:
    try:
        connection.settimeout(_HANDSHAKE_S)
        caller = check_caller(connection, nodes.key)
        hello = json.loads(caller.hello)
        if objection := _objection(nodes, agreement, hello):
            answer_caller(connection, nodes.key, caller, objection)
    except (OSError, EOFError, StrangerError, ValueError) as error:
        objection = str(error)
    if objection:
        log.warning("%s was turned away: %s", address, objection)
        connection.close()
    else:
        arrivals.put(_Arrival(number, hello["node"], connection, caller))


def _let_in(arrival: _Arrival, key: bytes) -> bool:
    """Tell a pod that it has come to its leader; return whether it could still be told."""
    try:
        answer_caller(arrival.connection, key, arrival.caller, "")
    except OSError:
        return False
    return True


def _objection(nodes: Nodes, agreement: str, hello: dict[str, object]) -> str:
    index = hello["node"]
    if hello["nodes"] != nodes.count or index not in range(1, nodes.count):
        return (
            f"The leader's group has {nodes.count} pods, and this is pod {index} of "
            f"{hello['nodes']}. Start all of them with the same --nnodes."
        )
    if hello["agreement"] != agreement:
        return (
            "The leader was started with other settings. Start all pods of the group with the "
            "same flags; only --node-rank differs."
        )
    return ""


def _call_leader(nodes: Nodes, hello: bytes) -> Line:
    connection = socket.create_connection((nodes.leader, nodes.port), timeout=_HANDSHAKE_S)
    try:
        if objection := call_leader(connection, nodes.key, hello):
            raise NodesDisagreeError(objection)
    except BaseException:
        connection.close()
        raise
    return Line(connection, "Pod 0")


def _who_is_missing(nodes: Nodes, lines: dict[int, Line]) -> str:
    missing = ", ".join(str(i) for i in range(1, nodes.count) if i not in lines)
    return (
        f"Of a group of {nodes.count} pods, pod {missing} did not come in {nodes.wait_s:g} s. "
        "See whether it is scheduled and runs (kubectl get pods, kubectl logs), resolves "
        f"{nodes.leader}, may reach port {nodes.port} of pod 0 (network policies), and has the "
        "same admin token."
    )


def _why_unreached(nodes: Nodes, error: Exception) -> str:
    return (
        f"Pod {nodes.index} did not reach its leader at {nodes.leader}:{nodes.port} in "
        f"{nodes.wait_s:g} s ({error}). See whether pod 0 is scheduled and runs (kubectl get pods, "
        "kubectl logs), whether the name resolves, and whether network policies let this pod "
        "reach that port."
    )
