"""Whether a download can begin: libraries retry for minutes where there is no network."""

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

SECONDS = 5.0  # to reach a host
STALLED_SECONDS = 30.0  # without a byte


def unreachable(url: str) -> str | None:
    """Return why the host of a URL cannot be reached within seconds, or None; behind a proxy nothing is tried."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if {"http", "https", "all"} & {*urllib.request.getproxies()}:
        return None
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached: {(error.strerror or str(error) or 'no answer').lower()}"
    return None


@contextmanager
def no_endless_wait() -> Iterator[None]:
    """Let connections inside the block fail that stall; the standard library waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
