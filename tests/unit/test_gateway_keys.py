"""API keys: made, stored as hashes, told apart."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import pytest
import yaml

from mizzen.runtime.gateway.keys import (
    KeyHash,
    Keyring,
    hash_key,
    make_key,
    parse_hash,
    parse_lines,
    parse_secret,
    print_key_secret,
    verify_key,
)
from mizzen.runtime.gateway.sinks import KeySink


def who(ring: Keyring, key: str) -> str | None:
    client = ring.identify(key)
    return None if client is None else client.id


def test_a_key_fits_its_hash_and_no_other() -> None:
    key, other = make_key(), make_key()
    assert key.startswith("mz-")
    assert verify_key(key, hash_key(key))
    assert not verify_key(other, hash_key(key))
    assert hash_key(key) != hash_key(key)


def test_the_stored_form_is_the_documented_one() -> None:
    expected = hashlib.sha256(b"\x01\x02" + b"mz-k").hexdigest()
    assert hash_key("mz-k", salt=b"\x01\x02") == f"sha256:0102:{expected}"


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:0:ab", "md5:00:" + "0" * 64, "sha256:zz:" + "0" * 64, "0" * 64]
)
def test_what_is_no_hash_lets_nobody_in(text: str) -> None:
    assert parse_hash(text) is None
    assert not verify_key("", text)


def test_the_printed_secret_lets_the_printed_key_in() -> None:
    out, notes = io.StringIO(), io.StringIO()
    key = print_key_secret("alice-1", out=out, notes=notes)
    secret = yaml.safe_load(out.getvalue())
    assert secret["metadata"]["labels"]["mizzen.dev/api-keys"] == "true"
    assert verify_key(key, secret["stringData"]["alice-1"])
    assert key not in out.getvalue()
    assert key in notes.getvalue()


@pytest.mark.parametrize("name", ["", "Bob", "a b", "-a", "a-", "a" * 60, "a\nb", "a/b"])
def test_a_name_that_a_secret_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a key"):
        print_key_secret(name, out=io.StringIO(), notes=io.StringIO())


def _hashed(key: str) -> KeyHash:
    parsed = parse_hash(hash_key(key))
    assert parsed is not None
    return parsed


def test_a_key_is_known_by_its_id_until_its_source_drops_it() -> None:
    ring = Keyring()
    ring.replace("one", {"a": _hashed("ka"), "b": _hashed("kb")})
    ring.replace("two", {"c": _hashed("kc")})
    assert [who(ring, k) for k in ("ka", "kb", "kc", "kd", "")] == ["a", "b", "c", None, None]
    ring.replace("one", {"b": _hashed("kb")})
    # Also a key that was let in a moment ago, and is remembered, is out at once.
    assert [who(ring, k) for k in ("ka", "kb", "kc")] == [None, "b", "c"]
    ring.replace("one", {})
    assert len(ring) == 1


def test_a_client_may_send_any_bytes_as_a_key() -> None:
    ring = Keyring()
    ring.replace("one", {"a": _hashed("ka")})
    assert who(ring, "\udcff\x00") is None


def _secret(name: str, **data: str) -> dict[str, Any]:
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    return {"metadata": {"name": name, "namespace": "home"}, "data": encoded}


def test_a_secret_may_hold_keys_beside_other_things() -> None:
    keys, bad = parse_secret(
        {**_secret("s", a=hash_key("ka"), note="hello")["data"], "broken": "%%%"}
    )
    assert list(keys) == ["a"]
    assert bad == ["note", "broken"]


def test_secrets_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    ring = Keyring()
    sink = KeySink(ring)
    sink.replace([_secret("one", a=hash_key("ka")), _secret("two", b=hash_key("kb"))])
    assert who(ring, "ka") == "a"
    sink.put(_secret("one", c=hash_key("kc")))
    assert (who(ring, "ka"), who(ring, "kc")) == (None, "c")
    sink.drop(_secret("one"))
    assert who(ring, "kc") is None
    sink.replace([])
    assert len(ring) == 0
    sink.put({"metadata": {"name": "empty", "namespace": "home"}, "data": None})
    sink.put(_secret("plain", oops="mz-the-key-itself"))
    assert "Secret home/plain: entry oops is not" in caplog.text
    assert "mz-the-key-itself" not in caplog.text


def test_a_keys_file_is_read_line_by_line() -> None:
    hashed = hash_key("ka")
    assert list(parse_lines(["# who", "", f"a {hashed}  # comment"])) == ["a"]
    with pytest.raises(ValueError, match="Line 2 of the keys file"):
        parse_lines([f"a {hashed}", "b nonsense"])
