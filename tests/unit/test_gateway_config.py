"""Settings of the gateway, and which headers pass through it."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict, CIMultiDictProxy
from pydantic import ValidationError
from pydantic_settings import CliApp

from mizzen.runtime.gateway.config import GatewayConfig
from mizzen.runtime.gateway.headers import answer_headers, request_headers


def test_flags_are_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIZZEN_GATEWAY_MAX_BODY_MIB", "7")
    monkeypatch.setenv("MIZZEN_GATEWAY_WATCH_NAMESPACES", '["a", "b"]')
    config = CliApp.run(
        GatewayConfig,
        cli_args=[
            *("--upstream", "a=http://127.0.0.1:8000"),
            *("--upstream", "b/c=http://127.0.0.1:9000/"),
            *("--auth", "off"),
            *("--metrics-port", "9"),
        ],
    )
    assert config.upstreams == [("a", "http://127.0.0.1:8000"), ("b/c", "http://127.0.0.1:9000")]
    assert (config.auth, config.health_port, config.max_body_mib) == ("off", 9, 7)
    assert config.watch_namespaces == ["a", "b"]


def test_keys_are_asked_for_unless_told_otherwise() -> None:
    assert GatewayConfig().auth == "on"


def test_the_health_port_makes_room_for_a_runtime_beside_it() -> None:
    assert GatewayConfig().health_port == 8002
    assert GatewayConfig(upstream=["a=http://b"], auth="off").health_port == 8082


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"upstream": ["http://127.0.0.1:8000"]}, "is not NAME=URL; write it as"),
        ({"upstream": ["a=127.0.0.1:8000"]}, "is not NAME=URL; write it as"),
        ({"upstream": ["a=http://b"]}, "add --keys-file PATH, or --auth off"),
        ({"max_body_mib": 0}, "greater than or equal to 1"),
        ({"bogus": 1}, "Extra inputs are not permitted"),
    ],
)
def test_bad_settings_say_what_to_change(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        GatewayConfig(**settings)  # type: ignore[arg-type]


def _headers(*pairs: tuple[str, str]) -> CIMultiDictProxy[str]:
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_headers_of_one_hop_and_of_the_body_end_at_the_gateway() -> None:
    given = _headers(
        ("Host", "gateway"),
        ("Authorization", "Bearer mz-secret"),
        ("Connection", "close, X-One"),
        ("Connection", "x-two"),
        ("X-One", "1"),
        ("X-Two", "2"),
        ("Keep-Alive", "5"),
        ("TE", "trailers"),
        ("Transfer-Encoding", "chunked"),
        ("Upgrade", "h2c"),
        ("Expect", "100-continue"),
        ("Content-Length", "3"),
        ("Content-Encoding", "gzip"),
        ("Content-Type", "application/json"),
        ("X-Request-Id", "theirs"),
        ("X-Kept", "a"),
        ("X-Kept", "b"),
    )
    kept = request_headers(given, request_id="ours", with_authorization=False)
    assert sorted(kept.items()) == [
        ("Content-Type", "application/json"),
        ("X-Kept", "a"),
        ("X-Kept", "b"),
        ("X-Request-Id", "ours"),
    ]


def test_without_keys_of_its_own_the_gateway_passes_the_clients_on() -> None:
    kept = request_headers(
        _headers(("Authorization", "Bearer x")), request_id="r", with_authorization=True
    )
    assert kept["Authorization"] == "Bearer x"


def test_an_answer_keeps_its_length_and_loses_its_servers_name() -> None:
    given = _headers(("Content-Length", "3"), ("Server", "uvicorn"), ("Connection", "close"))
    assert list(answer_headers(given).items()) == [("Content-Length", "3")]
