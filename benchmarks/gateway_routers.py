"""The routers that are measured before one dummy backend: how each is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers import peer_python
from hack.ports import free_port
from mizzen.runtime.gateway.keys import hash_key, make_key

_LITELLM_KEY = "sk-bench"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a router runs, and before what."""

    folder: Path
    port: int
    backend_port: int
    cache: Path


@dataclass(frozen=True, slots=True)
class Router:
    """How a router is started and asked."""

    command: tuple[str, ...]
    port: int
    key: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def mizzen(place: Place) -> Router:
    """Our gateway as in a pod: keys, limits, affinity."""
    key, keys = make_key(), place.folder / "keys"
    keys.write_text(f"bench {hash_key(key)} requests-per-minute=100000000\n")
    command = (
        *(sys.executable, "-m", "mizzen.cli", "gateway", "--host", "127.0.0.1"),
        *("--port", str(place.port), "--metrics-port", str(free_port())),
        *("--upstream", f"dummy=http://127.0.0.1:{place.backend_port}"),
        *("--keys-file", str(keys), "--lame-duck-s", "0", "--log-level", "warning"),
    )
    return Router(command, place.port, key)


def litellm(place: Place) -> Router:
    """Litellm's proxy with one worker and a key."""
    config = place.folder / "litellm.yaml"
    model = {
        "model_name": "dummy",
        "litellm_params": {
            "model": "openai/dummy",
            "api_base": f"http://127.0.0.1:{place.backend_port}/v1",
            "api_key": "none",
        },
    }
    # JSON is YAML too.
    settings = {"model_list": [model], "general_settings": {"master_key": _LITELLM_KEY}}
    config.write_text(json.dumps(settings))
    program = peer_python("litellm").with_name("litellm")
    command = (
        *(str(program), "--config", str(config), "--host", "127.0.0.1"),
        *("--port", str(place.port), "--num_workers", "1", "--telemetry", "False"),
    )
    # Its table of prices comes with it: nothing is fetched.
    return Router(command, place.port, _LITELLM_KEY, {"LITELLM_LOCAL_MODEL_COST_MAP": "True"})


def vllm_router(place: Place) -> Router:
    """VLLM's router, which goes by the prompt's prefix as ours does."""
    program = peer_python("vllm-router").with_name("vllm-router")
    command = (
        *(str(program), "--worker-urls", f"http://127.0.0.1:{place.backend_port}"),
        *("--host", "127.0.0.1", "--port", str(place.port), "--policy", "cache_aware"),
        *("--prometheus-port", str(free_port()), "--log-level", "error"),
    )
    return Router(command, place.port)


def nginx(place: Place) -> Router | None:
    """Debian's nginx with one worker; None where there is none to be had."""
    program = _find_nginx(place.cache)
    if program is None:
        return None
    config = _nginx_config(place.folder, place.port, place.backend_port)
    return Router((str(program), "-p", str(place.folder), "-c", str(config)), place.port)


def _find_nginx(cache: Path) -> Path | None:
    """Return the installed nginx, else Debian's, unpacked into a cache; None without either."""
    if (installed := shutil.which("nginx")) is not None:
        return Path(installed)
    unpacked = cache / "usr/sbin/nginx"
    if not unpacked.exists() and shutil.which("apt-get"):
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", "nginx"], cwd=cache, check=False)
        for package in cache.glob("nginx_*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(cache)], check=True)
    return unpacked if unpacked.exists() else None


def _nginx_config(folder: Path, port: int, backend_port: int) -> Path:
    """Write a configuration of one worker that streams."""
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log /dev/null;\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; client_max_body_size 16m; client_body_buffer_size 1m;\n"
        + "".join(
            f"{kind}_temp_path {folder};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        + f"upstream backend {{ server 127.0.0.1:{backend_port}; keepalive 64; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://backend;\n"
        'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    return path


ROUTERS: Mapping[str, Callable[[Place], Router | None]] = {
    "mizzen": mizzen,
    "nginx": nginx,
    "litellm": litellm,
    "vllm-router": vllm_router,
}
