"""Which headers pass through a proxy and which end at it (RFC 9110, section 7.6.1)."""

from __future__ import annotations

import re
import uuid

from multidict import CIMultiDict, CIMultiDictProxy

REQUEST_ID = "X-Request-Id"
_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",  # codespell:ignore te
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
# The gateway reads the body (and unpacks it) and sends its own, so these describe the wrong one.
# Tokens are sent as they come: an encoding would only hold them back.
_REPLACED_IN_REQUESTS = frozenset(
    ("host", "content-length", "content-encoding", "accept-encoding", "expect", "x-request-id")
)
_REPLACED_IN_ANSWERS = frozenset(("date", "server", "x-request-id"))
_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,128}")


def request_headers(
    headers: CIMultiDictProxy[str], *, request_id: str, with_authorization: bool
) -> CIMultiDict[str]:
    """Return what a replica gets to see of a client's headers; never the gateway's API key."""
    own_key = frozenset() if with_authorization else frozenset(("authorization",))
    dropped = _REPLACED_IN_REQUESTS | own_key
    kept = _end_to_end(headers, dropped)
    kept[REQUEST_ID] = request_id
    return kept


def answer_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Return what a client gets to see of a replica's headers."""
    return _end_to_end(headers, _REPLACED_IN_ANSWERS)


def request_id_of(headers: CIMultiDictProxy[str]) -> str:
    """Return the client's request id if it is a harmless one, else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _REQUEST_ID_FORM.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _end_to_end(headers: CIMultiDictProxy[str], dropped: frozenset[str]) -> CIMultiDict[str]:
    named = {
        name.strip().lower()
        for value in headers.getall("Connection", [])
        for name in value.split(",")
    }
    kept: CIMultiDict[str] = CIMultiDict()
    for name, value in headers.items():
        if (lower := name.lower()) not in _HOP_BY_HOP and lower not in dropped | named:
            kept.add(name, value)
    return kept
