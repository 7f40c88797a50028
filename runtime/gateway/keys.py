"""API keys: making them, hashing them, and checking a client's key against the hashes.

A key has 256 random bits, so a salted SHA-256 is enough: there is nothing to guess.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TextIO

from mizzen.runtime.gateway.limits import Limits, parse_limits

KEY_LABEL = "mizzen.dev/api-keys"
LIMITS_ANNOTATION = "mizzen.dev/limits"
_NO_LIMITS = Limits()
_KEY_PREFIX = "mz-"
_SALT_BYTES = 16
_REMEMBERED = 4096
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?")
_FORMAT = re.compile(r"sha256:([0-9a-f]{2,128}):([0-9a-f]{64})")


def make_key() -> str:
    """Return a new API key."""
    return _KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str, *, salt: bytes | None = None) -> str:
    """Return `sha256:<salt>:<hash>` of a key, with a fresh salt when none is given."""
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    return f"sha256:{salt.hex()}:{_digest(salt, key).hex()}"


def verify_key(key: str, hashed: str) -> bool:
    """Tell whether `hashed` was made from `key`; takes the same time for every wrong key."""
    parsed = parse_hash(hashed)
    return parsed is not None and parsed.matches(key)


@dataclass(frozen=True, slots=True)
class KeyHash:
    """A stored key: enough to recognise it, not enough to use it."""

    salt: bytes
    digest: bytes
    limits: Limits = _NO_LIMITS

    def matches(self, key: str) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)


def parse_hash(text: str) -> KeyHash | None:
    """Read `sha256:<salt hex>:<hash hex>`, None when it is not of that form."""
    match = _FORMAT.fullmatch(text.strip())
    if match is None or len(match[1]) % 2:
        return None
    return KeyHash(bytes.fromhex(match[1]), bytes.fromhex(match[2]))


@dataclass(frozen=True, slots=True)
class Client:
    """Whose key it is; keys of one id in two sources are two clients."""

    source: str
    id: str
    limits: Limits

    @property
    def account(self) -> str:
        """Name of what it uses."""
        return f"{self.source}:{self.id}"


class Keyring:
    """The keys that are let in, grouped by their source so that a source can be replaced."""

    def __init__(self) -> None:
        self._sources: dict[str, dict[str, KeyHash]] = {}
        # Hashing against every key costs a microsecond each; a client's second request costs one.
        self._remembered: OrderedDict[bytes, Client] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources.values())

    def replace(self, source: str, keys: Mapping[str, KeyHash]) -> None:
        """Let these keys in from now on, and no other of the same source."""
        if keys:
            self._sources[source] = dict(keys)
        else:
            self._sources.pop(source, None)
        self._remembered.clear()

    def sources(self) -> frozenset[str]:
        """Where the present keys came from."""
        return frozenset(self._sources)

    def limits(self, account: str) -> Limits | None:
        """Return the limits of a client by its account, None where its key is not let in."""
        source, _, key_id = account.rpartition(":")
        hashed = self._sources.get(source, {}).get(key_id)
        return None if hashed is None else hashed.limits

    def identify(self, key: str) -> Client | None:
        """Return whose key it is, None for one that is not let in."""
        fingerprint = hashlib.sha256(key.encode(errors="replace")).digest()
        if (known := self._remembered.get(fingerprint)) is not None:
            self._remembered.move_to_end(fingerprint)
            return known
        found = None
        # Every key is compared even after a match: the time says nothing about which one it was.
        for source, keys in self._sources.items():
            for key_id, hashed in keys.items():
                if hashed.matches(key):
                    found = Client(source, key_id, hashed.limits)
        if found is not None:
            self._remembered[fingerprint] = found
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return found


def parse_secret(
    data: Mapping[str, str], limits: Limits = _NO_LIMITS
) -> tuple[dict[str, KeyHash], list[str]]:
    """Return the keys in a Secret's data, each with these limits, and the entries that are none."""
    keys: dict[str, KeyHash] = {}
    bad: list[str] = []
    for key_id, encoded in data.items():
        try:
            hashed = parse_hash(base64.b64decode(encoded, validate=True).decode())
        except (binascii.Error, UnicodeDecodeError):
            hashed = None
        if hashed is None:
            bad.append(key_id)
        else:
            keys[key_id] = replace(hashed, limits=limits)
    return keys, bad


def parse_lines(lines: Iterable[str]) -> dict[str, KeyHash]:
    """Read a keys file: `ID sha256:SALT:HASH [LIMIT=NUMBER ...]` on each line, # for comments.

    Raises:
        ValueError: a line is neither; its number is named.
    """
    keys: dict[str, KeyHash] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#", 1)[0].split()
        if not text:
            continue
        hashed = parse_hash(text[1]) if len(text) >= 2 else None
        if hashed is None:
            raise ValueError(f"Line {number} of the keys file is not `ID sha256:SALT:HASH`.")
        try:
            limits = parse_limits(" ".join(text[2:]))
        except ValueError as error:
            raise ValueError(f"Line {number} of the keys file: {error}") from None
        keys[text[0]] = replace(hashed, limits=limits)
    return keys


def secret_manifest(name: str, hashed: str, limits: Limits = _NO_LIMITS) -> str:
    """Return the Secret that lets one key in, as YAML to apply in the gateway's namespace."""
    noted = f"  annotations:\n    {LIMITS_ANNOTATION}: {limits}\n" if limits != _NO_LIMITS else ""
    return (
        "apiVersion: v1\n"
        "kind: Secret\n"
        "metadata:\n"
        f"  name: mizzen-key-{name}\n"
        "  labels:\n"
        f'    {KEY_LABEL}: "true"\n'
        "    app.kubernetes.io/part-of: mizzen\n"
        f"{noted}"
        "type: Opaque\n"
        "stringData:\n"
        f"  {name}: {hashed}\n"
    )


def print_key_secret(
    name: str,
    limits: Limits = _NO_LIMITS,
    *,
    out: TextIO | None = None,
    notes: TextIO | None = None,
) -> str:
    """Print the Secret for a new key on `out` and the key itself, once, on `notes`; return the key.

    They go to different streams so that `mizzen keys create NAME | kubectl apply -f -` applies the
    hash and shows the key.

    Raises:
        ValueError: the name cannot be part of a Secret's name.
    """
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{name!r} cannot name a key: use 1 to 52 lower-case letters, digits and '-', "
            "with a letter or digit at both ends."
        )
    key = make_key()
    (out or sys.stdout).write(secret_manifest(name, hash_key(key), limits))
    (notes or sys.stderr).write(
        f"API key {name} (shown only now): {key}\n"
        "The Secret above holds its hash; apply it in the gateway's namespace to let the key in.\n"
    )
    return key


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode(errors="replace")).digest()
