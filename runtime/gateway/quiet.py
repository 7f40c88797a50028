"""Keeps broken requests out of the log: anybody can send them, and each would be a traceback."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

_BROKEN = (HttpProcessingError, web.RequestPayloadError)


def server_log() -> logging.Logger:
    """Return the logger for the HTTP library, which would log each as a failure of ours."""
    logger = logging.getLogger("mizzen.runtime.gateway.http")
    logger.addFilter(is_ours)  # adding the same one again changes nothing
    return logger


def is_ours(record: logging.LogRecord) -> bool:
    """Whether a record tells of more than a request that cannot be read."""
    return not (record.exc_info and isinstance(record.exc_info[1], _BROKEN))
