"""A connection to another pod of the group: messages of plain bytes, and signs of life between.

A process that is killed closes its connections and is missed at once. One that hangs, is stopped
or has lost its network is missed by its silence.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from mizzen.runtime.errors import RankLostError

ALIVE, MESSAGE, SERVING, END = (bytes([kind]) for kind in range(4))
BEAT_S = 0.5
SILENCE_S = 3.0
# Reading weights may hold a process up for longer than a step ever does.
START_SILENCE_S = 60.0
_LENGTH_BYTES = 4
_LAST_READS = 8
_LIMIT_BYTES = 64 << 20  # many times the largest step


class FrameTooLongError(OSError):
    """The other side announced more bytes than it may send."""


def read_frame(read: Callable[[int], bytes], *, limit: int) -> bytes:
    """Return the next frame's bytes.

    Raises:
        EOFError: the connection was closed.
        FrameTooLongError: the frame is longer than `limit`.
    """
    length = int.from_bytes(_read_exactly(read, _LENGTH_BYTES), "big")
    if length > limit:
        raise FrameTooLongError(f"A frame of {length} bytes was announced, allowed are {limit}.")
    return _read_exactly(read, length)


def write_frame(connection: socket.socket, payload: bytes) -> None:
    """Send one frame."""
    connection.sendall(len(payload).to_bytes(_LENGTH_BYTES, "big") + payload)


class Line:
    """One connection, held by both sides alike, from its proof of identity to its end."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        # For this long a send may be stuck; a read only looks whether the line still stands.
        connection.settimeout(SILENCE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self._connection = connection
        self._silence_s = START_SILENCE_S
        self._heard_at = time.monotonic()
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self._why = f"{peer} closed its connection."
        threading.Thread(target=self._beat, name=f"beat to {peer}", daemon=True).start()

    @property
    def own_address(self) -> str:
        """The address by which the other side knows us."""
        return str(self._connection.getsockname()[0])

    def send(self, payload: bytes, kind: bytes = MESSAGE) -> None:
        """Send a message.

        Raises:
            RankLostError: the other side is gone, or takes nothing more.
        """
        try:
            with self._sending:
                write_frame(self._connection, kind + payload)
        except TimeoutError as error:
            raise RankLostError(f"{self.peer} took no message for {SILENCE_S:g} s.") from error
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> tuple[bytes, bytes]:
        """Return the next message and its kind: MESSAGE, SERVING or END.

        Raises:
            RankLostError: the connection ended without an END, or was silent for too long.
        """
        while True:
            try:
                frame = read_frame(self._read, limit=_LIMIT_BYTES)
            except (OSError, EOFError) as error:
                raise self._lost() from error
            if (kind := frame[:1]) != ALIVE:
                return kind, frame[1:]

    def expect_life(self) -> None:
        """From now on, silence of `SILENCE_S` ends the line."""
        self._silence_s = SILENCE_S

    def end(self) -> None:
        """Say that this end is meant, and close."""
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(RankLostError, OSError):
                self.send(b"", END)
                self._connection.shutdown(socket.SHUT_WR)
                # Closed with signs of life unread, the connection would be reset, and the END
                # lost with it. The other side closes as soon as it has read it.
                for _ in range(_LAST_READS):
                    if not self._connection.recv(_LENGTH_BYTES):
                        break
        self.close()

    def close(self) -> None:
        """Close; whoever waits in `receive` is woken."""
        self._closed.set()
        with contextlib.suppress(OSError):  # the other side was faster
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            if time.monotonic() - self._heard_at > self._silence_s:
                self._why = f"{self.peer} gave no sign of life for {self._silence_s:g} s."
                self.close()
                return
            try:
                self.send(b"", ALIVE)
            except RankLostError:
                self.close()
                return

    def _read(self, size: int) -> bytes:
        while True:
            try:
                data = self._connection.recv(size)
            except TimeoutError:
                continue  # `_beat` judges silence
            self._heard_at = time.monotonic()
            return data

    def _lost(self) -> RankLostError:
        return RankLostError(self._why)


def _read_exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := read(size - len(data))):
            raise EOFError("The connection was closed.")
        data += part
    return bytes(data)
