"""Is what this backend alone needs there? Imports nothing of it."""

from __future__ import annotations

from importlib.util import find_spec

from mizzen.runtime.train.errors import BackendMissingError

_PACKAGES = ("accelerate", "peft", "transformers")


def check_installed() -> None:
    """Raise BackendMissingError unless the packages of the extra `transformers` are there."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendMissingError(missing)
