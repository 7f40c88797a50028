"""Who may call what. Nothing is reachable without a class: routes are built with one."""

import hashlib
import hmac
import ipaddress
import logging
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

log = logging.getLogger(__name__)


class Access(StrEnum):
    """How closely a call is guarded."""

    OPEN = "open"  # health: probes carry no credentials
    USER = "user"  # inference: a key, where keys are configured
    ADMIN = "admin"  # changes what is served: the admin token, or loopback where there is none


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call was turned away."""

    status: int  # 401 asks for credentials, 403 says that none would help
    message: str


@dataclass(slots=True)
class SecretFile:
    """Secrets in a file, one a line, read again when the file changes.

    A mounted Secret is rotated by swapping a symlink, so the file's identity is checked on every
    call: one stat, against a restart of every replica at each rotation.
    """

    path: Path
    _stamp: tuple[int, int, int] | None = None
    _digests: list[bytes] = field(default_factory=list)

    def accepts(self, secret: str) -> bool:
        """Whether the file holds `secret`; compared in constant time, over all lines."""
        self._refresh()
        digest = hashlib.sha256(secret.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)

    def _refresh(self) -> None:
        try:
            stat = self.path.stat()
            stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if stamp == self._stamp:
                return
            lines = self.path.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            # A file that cannot be read lets nobody in; an old copy might let a revoked key in.
            log.error("cannot read secrets from %s: %s", self.path, error)
            self._digests, self._stamp = [], None
            return
        self._digests = [hashlib.sha256(line.encode()).digest() for line in lines]
        self._stamp = stamp


@dataclass(slots=True)
class Gate:
    """Decides each call from its class, its Authorization value and where it comes from."""

    admin_token: SecretFile | None = None
    api_keys: SecretFile | None = None

    def check(self, access: Access, *, authorization: str, peer: str) -> Refusal | None:
        """Return None where the call may go on.

        `peer` is the caller's IP address; unknown ("") is not loopback.
        """
        if access is Access.OPEN:
            return None
        if access is Access.USER:
            return self._check_user(authorization)
        return self._check_admin(authorization, peer)

    def _check_user(self, authorization: str) -> Refusal | None:
        token = bearer(authorization)
        if self.api_keys is None or self.api_keys.accepts(token):
            return None
        if self.admin_token is not None and self.admin_token.accepts(token):
            return None  # who may change what is served may also use it
        return Refusal(401, "Send a valid API key as 'Authorization: Bearer KEY'.")

    def _check_admin(self, authorization: str, peer: str) -> Refusal | None:
        if self.admin_token is None:
            if is_loopback(peer):
                return None
            return Refusal(
                403, "Start the server with --admin-token-file to allow admin calls from afar."
            )
        if self.admin_token.accepts(bearer(authorization)):
            return None
        return Refusal(401, "Send the admin token as 'Authorization: Bearer TOKEN'.")


def bearer(authorization: str) -> str:
    """Return the token of an Authorization value, or "" (which no secret file holds)."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def is_loopback(peer: str) -> bool:
    """Whether an IP address is this machine's own."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)
