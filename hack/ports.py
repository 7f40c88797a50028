"""Ports for servers that must be told theirs before they bind it.

None comes from the range in which the kernel serves those who do not care: between our look and the
server's bind, anybody on the machine could be given the same one.
"""

import os
import socket
from collections.abc import Iterator
from itertools import count

# Above Ray's own ports, below Kubernetes' node ports; the kernel's begin at 32768.
_FIRST, _SPAN = 20_000, 10_000
_OF_ONE_PROCESS = 100


def free_ports(number: int, *, host: str = "127.0.0.1") -> list[int]:
    """Return ports that nobody listens on, each given out once by this process."""
    found: list[int] = []
    while len(found) < number:
        port = next(_candidates)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        found.append(port)
    return found


def free_port(*, host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on."""
    return free_ports(1, host=host)[0]


def _ports() -> Iterator[int]:
    # Processes that look at the same time, as a test run's do, begin at places of their own.
    begin = os.getpid() * _OF_ONE_PROCESS
    return (_FIRST + number % _SPAN for number in count(begin))


_candidates = _ports()
