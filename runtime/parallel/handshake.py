"""Two pods of a group prove to each other that they hold the same secret, without showing it.

Each side answers the other's fresh nonce with an HMAC. Both nonces, the direction and what the
follower says of itself are signed, so an answer can neither be replayed nor sent back to its
author. What follows on the connection is not encrypted: a pod network that can be listened in on
needs its own encryption, as for the collectives beside it.
"""

import hashlib
import hmac
import secrets
import socket
from dataclasses import dataclass

from mizzen.runtime.parallel.line import read_frame, write_frame

_NONCE_BYTES = _DIGEST_BYTES = 32
_LIMIT_BYTES = 1024  # of what is read from somebody who is not known yet


class StrangerError(Exception):
    """The other side does not hold the group's secret, or does not speak as we do."""


def group_key(secret: bytes, name: str) -> bytes:
    """Return the key of one group: another group's pods with the same secret have another."""
    return hmac.digest(secret, b"mizzen group " + name.encode(), hashlib.sha256)


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who proved to hold the secret, and what it said of itself."""

    hello: bytes
    nonce: bytes
    ours: bytes


def check_caller(connection: socket.socket, key: bytes) -> Caller:
    """Be the leader: have whoever comes prove that it is a follower.

    Raises:
        StrangerError: it does not hold the secret.
        EOFError, OSError: the connection ended or was too slow.
    """
    ours = secrets.token_bytes(_NONCE_BYTES)
    write_frame(connection, ours)
    answer = _read(connection)
    nonce, answer = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
    proof, hello = answer[:_DIGEST_BYTES], answer[_DIGEST_BYTES:]
    if not hmac.compare_digest(proof, _sign(key, b"follower", ours, nonce, hello)):
        raise StrangerError("it does not hold the group's secret")
    return Caller(hello, nonce, ours)


def answer_caller(connection: socket.socket, key: bytes, caller: Caller, objection: str) -> None:
    """Prove that we are the leader, and say what stands against the follower; "" lets it in."""
    verdict = objection.encode()
    proof = _sign(key, b"leader", caller.nonce, caller.ours, caller.hello, verdict)
    write_frame(connection, proof + verdict)


def call_leader(connection: socket.socket, key: bytes, hello: bytes) -> str:
    """Be a follower: prove who we are, check that it is the leader; return its objection, or "".

    Raises:
        StrangerError: it does not hold the secret, or says that we do not.
        EOFError, OSError: the connection ended or was too slow.
    """
    theirs = _read(connection)
    ours = secrets.token_bytes(_NONCE_BYTES)
    proof = _sign(key, b"follower", theirs, ours, hello)
    write_frame(connection, ours + proof + hello)
    try:
        answer = _read(connection)
    except EOFError as error:
        raise StrangerError("it turned us away: its admin token is another") from error
    proof, verdict = answer[:_DIGEST_BYTES], answer[_DIGEST_BYTES:]
    if not hmac.compare_digest(proof, _sign(key, b"leader", ours, theirs, hello, verdict)):
        raise StrangerError("who listens there does not hold the group's secret")
    return verdict.decode()


def _read(connection: socket.socket) -> bytes:
    return read_frame(connection.recv, limit=_LIMIT_BYTES)


def _sign(key: bytes, *parts: bytes) -> bytes:
    # With their lengths: else bytes could move from one part to the next.
    message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(key, message, hashlib.sha256)
